"""Edge-supervised learning (Sec. 3.2 and 7.2): predicts edges from the attention map of the end-of-text token.

Shape legend: B samples, N image tokens (h * w), Y text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raphael_dist.config.model_sections import Edge


class EdgeModule(nn.Module):
    """Five convolutions that predict the image's edges, as logits, from an attention map (P in Sec. 7.2 of the paper).

    `channels`: width of the layers between the first and the last convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [1, channels, channels, channels, channels, 1]
        layers: list[nn.Module] = []
        for i in range(5):
            layers += [nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, map_BNY: Tensor, end_B: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Return the logits of the predicted edges, float32 [B, h, w].

        Args:
            map_BNY: attention of each of N image tokens to each of Y text tokens. Only the map of the end-of-text token is
                used, scaled to a maximum of 1.
            end_B: for each sample, the index of the end-of-text token, int64.
            size_hw: height and width of the feature map whose pixels are the image tokens; h * w = N.
        """
        map_BN = map_BNY.gather(2, end_B[:, None, None].expand(-1, map_BNY.shape[1], 1)).squeeze(2).float()
        map_BN = map_BN / map_BN.amax(dim=1, keepdim=True).clamp(min=1e-12)
        image = map_BN.view(-1, 1, *size_hw).to(next(self.parameters()).dtype)
        logits: Tensor = self.net(image)
        return logits.squeeze(1).float()


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss for targets from 0 to 1, elementwise (Lin et al. 2017, Eq. 5, weighted by the target).

    `-alpha y (1-p)^gamma log p - (1-alpha) (1-y) p^gamma log(1-p)` with target y and p = sigmoid(logits). RAPHAEL's paper
    uses the focal loss but gives no form for soft targets such as HED's edge maps. The minimum is at p = y only for y = 0
    and 1: with gamma = 2 the best prediction for a target of 0.1 is 0.31.

    Args:
        logits: logits of the predicted edges.
        target: y, the strength of the edge at each position, 0..1.
        alpha: weight of positions with an edge; positions without an edge have the weight 1 - alpha.
        gamma: focusing parameter: down-weights positions that are already predicted well.
    """
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers through logarithms: the gradient of (1-p)^gamma is infinite at p = 1 if gamma is below 1.
    positive = -alpha * target * (gamma * log_q).exp() * log_p
    negative = -(1 - alpha) * (1 - target) * (gamma * log_p).exp() * log_q
    return positive + negative


def quality_focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Compute the quality focal loss `|y - p|^gamma BCE(p, y)`, elementwise (Li et al. 2020, Eq. 3).

    y is the target (0..1) and p = sigmoid(logits). The minimum of the loss is 0, at p = y. `gamma` is the focusing
    parameter: it down-weights positions that are already predicted well.
    """
    distance = (torch.sigmoid(logits) - target).square() + 1e-12  # finite gradients at 0 for every gamma
    return distance ** (gamma / 2) * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def edge_loss_B(logits: Sequence[Tensor], edge_BHW: Tensor, timestep_B: Tensor, config: Edge) -> Tensor:
    """Compute the edge loss of each sample, L_edge in Sec. 3.2, between predicted edges and HED's edge maps.

    Args:
        logits: the edges predicted in each transformer block, as logits, float32 [B, h, w].
        edge_BHW: HED's edge maps, 0..1. They are averaged to the size h x w of each block's logits.
        timestep_B: diffusion timestep of each sample, int64.
        config: the section `edge`. Samples with a timestep of at least edge.max_timestep (T_c in the paper) have loss 0;
            edge.weight is not applied.

    Returns:
        The mean of the loss over blocks and pixels of the predicted edge maps, float32 [B].
    """
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for logits_Bhw in logits:
        by_size.setdefault((logits_Bhw.shape[1], logits_Bhw.shape[2]), []).append(logits_Bhw)
    # The loss of all blocks at once: one by one, their small operations would be a fifth of a training step's launches.
    all_logits = torch.cat([torch.stack(maps, dim=1).flatten(1) for maps in by_size.values()], dim=1)
    targets = (F.adaptive_avg_pool2d(edge_BHW.float(), size).flatten(1).repeat(1, len(m)) for size, m in by_size.items())
    target = torch.cat(list(targets), dim=1)
    if config.focal_form == "focal":
        loss = focal_loss(all_logits, target, config.focal_alpha, config.focal_gamma)
    else:
        loss = quality_focal_loss(all_logits, target, config.focal_gamma)
    parts = torch.split(loss, [len(maps) * height * width for (height, width), maps in by_size.items()], dim=1)
    per_block = [
        torch.unflatten(part, 1, (len(maps), -1)).mean(dim=2) for part, maps in zip(parts, by_size.values(), strict=True)
    ]
    loss_B = torch.cat(per_block, dim=1).mean(dim=1)
    return torch.where(timestep_B < config.max_timestep, loss_B, torch.zeros_like(loss_B))
