"""Gates and the routing plan: which expert serves which text token and which sample, decided once before the U-Net runs.

Routing needs only the captions and the timesteps, so every block is routed up front, outside the recomputed region, and
recomputation cannot choose differently. Shape legend: B samples, Y text tokens, K experts, N image tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

GateGradient = Literal["straight_through", "none", "scaled"]


class Gate(nn.Module):
    """G of Sec. 3.1 and G' of Sec. 7.3: a feed-forward network with GELU from an embedding to one logit per expert."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits, [..., K]."""
        return self.net(x).float()


@dataclass(frozen=True)
class BlockPlan:
    """The routing of one transformer block for one micro-batch.

    time_expert_B: int64, the Time-MoE expert of each sample; None without a Time-MoE.
    time_samples: how many samples each time expert serves, on the host.
    time_factor_B: float32, 1 in value; carries the gradient to the time gate.
    balance_B: float32, the load-balance loss of the text gate per sample; None when it has no weight.
    space_weight_BYK: float32, `1/n_y` at the expert of each text token, 0 elsewhere; carries the gradient to the text gate.
    """

    time_expert_B: Tensor | None
    time_samples: list[int] | None
    time_factor_B: Tensor | None
    space_weight_BYK: Tensor | None
    balance_B: Tensor | None = None


def choose(logits: Tensor, noise: Tensor | None, gradient: GateGradient) -> tuple[Tensor, Tensor]:
    """route = argmax softmax(logits + noise) (Sec. 3.1), with the factor that gives the gate its gradient.

    Returns the chosen expert (int64) and the factor (float32), both of logits' shape without the last dimension. The
    factor is p / p.detach() (straight_through: value 1), the constant 1 (none) or p itself (scaled).
    """
    probability = torch.softmax(logits if noise is None else logits + noise, dim=-1)
    chosen = probability.detach().argmax(dim=-1)
    p = probability.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if gradient == "straight_through":
        return chosen, p / p.detach()
    return chosen, p if gradient == "scaled" else torch.ones_like(p)


def balance_loss_B(logits_BYK: Tensor, chosen_BY: Tensor) -> Tensor:
    """Load-balance loss of the text gate per sample, float32 [B]: K sum_k f_k P_k (Fedus et al. 2021, Eq. 4).

    f_k is the share of the sample's text tokens routed to expert k, P_k their mean probability; 1 when balanced. Per sample,
    not over the batch, so that every split of a batch agrees; the time gate, one choice a sample, has none for that reason.
    """
    num_experts = logits_BYK.shape[-1]
    share_BK = nn.functional.one_hot(chosen_BY, num_experts).float().mean(dim=1)
    return num_experts * (share_BK * torch.softmax(logits_BYK, dim=-1).mean(dim=1)).sum(dim=-1)


def space_weights_BYK(chosen_BY: Tensor, factor_BY: Tensor, num_experts: int, taking_part_BY: Tensor | None) -> Tensor:
    """Spread the mean over text tokens (the 1/n_y of Sec. 3.1) over the routed experts.

    `taking_part_BY` (bool) leaves tokens out of sum and count; None: all tokens take part.
    """
    onehot_BYK = nn.functional.one_hot(chosen_BY, num_experts).to(factor_BY.dtype)
    if taking_part_BY is None:
        return onehot_BYK * (factor_BY / chosen_BY.shape[1]).unsqueeze(-1)
    share_BY = taking_part_BY.to(factor_BY.dtype)
    share_BY = share_BY / share_BY.sum(dim=1, keepdim=True).clamp(min=1)
    return onehot_BYK * (factor_BY * share_BY).unsqueeze(-1)


@torch.no_grad()
def region_mask_BNY(map_BNY: Tensor, threshold: float) -> Tensor:
    """Mhat of Sec. 3.1: 1 where a text token's attention is at least `threshold` of its largest over the image.

    Computed in float32 and without a gradient. Returns float32 zeros and ones.
    """
    map_BNY = map_BNY.float()
    return (map_BNY >= threshold * map_BNY.amax(dim=1, keepdim=True)).float()
