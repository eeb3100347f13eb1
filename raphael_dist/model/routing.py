"""Gates and the routing plan: which expert serves which text token and which sample, decided once before the U-Net runs.

Routing needs only the captions and the timesteps, so every block is routed up front, outside the recomputed region, and
recomputation cannot choose differently. Shape legend: B samples, Y text tokens, K experts, N image tokens, D width, L
transformer blocks, H a gate's hidden width, R rows of any kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

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


def gate_logits(gates: Sequence[Gate], x: Tensor) -> Tensor:
    """Return the logits of all gates for the same input x [..., D], float32 [L, ..., K], as two products.

    The gates are alike and small; one by one they would be launched 3 L times, and 6 L times in the backward pass.
    """
    first, last = ([cast(nn.Linear, gate.net[i]) for gate in gates] for i in (0, 2))
    fused = nn.functional.linear(x, torch.cat([g.weight for g in first]), torch.cat([g.bias for g in first]))
    hidden_LRH = nn.functional.gelu(fused).flatten(0, -2).unflatten(-1, (len(first), -1)).transpose(0, 1)
    w_LHK, b_L1K = torch.stack([g.weight for g in last]).transpose(1, 2), torch.stack([g.bias for g in last]).unsqueeze(1)
    return torch.baddbmm(b_L1K, hidden_LRH, w_LHK).unflatten(1, x.shape[:-1]).float()


@dataclass(frozen=True)
class BlockPlan:
    """The routing of one transformer block for one micro-batch.

    time_expert_B: int64, the Time-MoE expert of each sample; None without a Time-MoE.
    time_samples: how many samples each time expert serves, int64 [K] on the device of the model; where experts are spread
        over ranks, what their exchange needs to know on the host as well (`expert_parallel.GroupSamples`).
    time_factor_B: float32, 1 in value; carries the gradient to the time gate.
    balance_B: float32, the load-balance loss of the text gate per sample; None when it has no weight.
    space_weight_BYK: float32, `1/n_y` at the expert of each text token, 0 elsewhere; carries the gradient to the text gate.
    """

    time_expert_B: Tensor | None
    time_samples: Any
    time_factor_B: Tensor | None
    space_weight_BYK: Tensor | None
    balance_B: Tensor | None = None


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """Return bool [..., num_classes], True at `index`. torch's own reads the largest index first on most devices."""
    return index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)


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


def band_of_timestep_B(timestep_B: Tensor, num_experts: int, num_timesteps: int) -> Tensor:
    """Return the time expert of each timestep by fixed boundaries, int64 [B]: K bands of equally many timesteps (not in the
    paper; Wan 2.2 has two such experts).

    In timesteps, not in the signal-to-noise ratio: training draws timesteps evenly, so every expert gets an even share of
    the samples, and stratified ones give every group of ranks as many for each.
    """
    return (timestep_B * num_experts // num_timesteps).long().clamp(0, num_experts - 1)


def balance_loss_B(logits_BYK: Tensor, chosen_BY: Tensor) -> Tensor:
    """Load-balance loss of the text gate per sample, float32 [B]: K sum_k f_k P_k (Fedus et al. 2021, Eq. 4).

    f_k is the share of the sample's text tokens routed to expert k, P_k their mean probability; 1 when balanced. Per sample,
    not over the batch, so that every split of a batch agrees; the time gate, one choice a sample, has none for that reason.
    Further axes may come first, such as the blocks.
    """
    num_experts = logits_BYK.shape[-1]
    share_BK = one_hot(chosen_BY, num_experts).float().mean(dim=-2)
    return num_experts * (share_BK * torch.softmax(logits_BYK, dim=-1).mean(dim=-2)).sum(dim=-1)


def space_weights_BYK(chosen_BY: Tensor, factor_BY: Tensor, num_experts: int, taking_part_BY: Tensor | None) -> Tensor:
    """Spread the mean over text tokens (the 1/n_y of Sec. 3.1) over the routed experts.

    `taking_part_BY` (bool) leaves tokens out of sum and count; None: all tokens take part. `chosen` and `factor` may have
    further axes first, such as the blocks.
    """
    onehot_BYK = one_hot(chosen_BY, num_experts).to(factor_BY.dtype)
    if taking_part_BY is None:
        return onehot_BYK * (factor_BY / chosen_BY.shape[-1]).unsqueeze(-1)
    share_BY = taking_part_BY.to(factor_BY.dtype)
    share_BY = share_BY / share_BY.sum(dim=-1, keepdim=True).clamp(min=1)
    return onehot_BYK * (factor_BY * share_BY).unsqueeze(-1)


@torch.no_grad()
def region_mask_BNY(map_BNY: Tensor, threshold: float) -> Tensor:
    """Mhat of Sec. 3.1: 1 where a text token's attention is at least `threshold` of its largest over the image.

    Computed in float32 and without a gradient. Returns float32 zeros and ones.
    """
    map_BNY = map_BNY.float()
    return (map_BNY >= threshold * map_BNY.amax(dim=1, keepdim=True)).float()
