"""Gates and routing: choose the expert of each text token and each sample, for all blocks, before the U-Net runs.

Routing depends only on captions and timesteps. All blocks are routed outside the part that activation recomputation runs
again, so recomputation always uses the same experts.

Shape legend: B samples, Y text tokens, K experts, N image tokens, D width, L transformer blocks, H a gate's hidden width, R
inputs of a gate (text tokens or timesteps of all samples).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

GateGradient = Literal["straight_through", "none", "scaled"]


class Gate(nn.Module):
    """A small network that selects an expert: it maps an embedding to one logit per expert (Sec. 3.1 and 7.3)."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per expert, float32 [..., K], for embeddings x [..., D] of text tokens or timesteps."""
        logits: Tensor = self.net(x)
        return logits.float()


def gate_kind(name: str) -> Literal["space", "time"] | None:
    """Return whether the parameter `name` belongs to a gate for space experts ("space") or time experts ("time").

    Returns None if it belongs to no gate. Gates are the networks that select experts. The name may have any prefix.
    """
    parts = name.split(".")
    return "space" if "text_gates" in parts else "time" if "time_gates" in parts else None


def gate_logits(gates: Sequence[Gate], x: Tensor) -> Tensor:
    """Return the logits of the gates of L transformer blocks for the same input x [..., D], float32 [L, ..., K].

    A gate has one logit for each of K experts. Two matrix products compute the logits of all gates. Running the gates one by
    one would need 3 kernel launches per gate (two layers and GELU), and 6 per gate in the backward pass.
    """
    first, last = ([cast(nn.Linear, gate.net[i]) for gate in gates] for i in (0, 2))
    fused = nn.functional.linear(x, torch.cat([g.weight for g in first]), torch.cat([g.bias for g in first]))
    hidden_LRH = torch.unflatten(nn.functional.gelu(fused).flatten(0, -2), -1, (len(first), -1)).transpose(0, 1)
    w_LHK, b_L1K = torch.stack([g.weight for g in last]).transpose(1, 2), torch.stack([g.bias for g in last]).unsqueeze(1)
    return torch.unflatten(torch.baddbmm(b_L1K, hidden_LRH, w_LHK), 1, x.shape[:-1]).float()


@dataclass(frozen=True)
class BlockRouting:
    """The experts selected for one transformer block and one micro-batch of B samples.

    Attributes:
        time_expert_B: int64, the time expert of each sample; None without a Time-MoE.
        time_samples: number of samples of each time expert, int64 [K] on the model's device. If the time experts are
            sharded over ranks, it is a `GroupSamples` (`parallel.expert_dispatch`) with the counts of all these ranks.
        time_factor_B: float32, factor on the output of each sample's time expert, through which the time gate gets its
            gradient (the second result of `choose`).
        space_weight_BYK: float32, weight of each of K space experts for each of Y text tokens. The weight of the token's
            expert is the factor that `choose` returned, divided by the number of the sample's text tokens (without padding
            tokens if `model.mask_padding`). The weights of the other experts are 0. The text gate gets its gradient through
            these weights. None without a Space-MoE.
        balance_B: float32, load-balance loss of the gates for each sample; None if this loss is off or gradients are
            disabled.
    """

    time_expert_B: Tensor | None
    time_samples: Any
    time_factor_B: Tensor | None
    space_weight_BYK: Tensor | None
    balance_B: Tensor | None = None


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """Return the one-hot encoding of `index` (int64 [...], from 0), bool [..., num_classes].

    torch's `one_hot` reads the largest index on most devices, so the host would wait.
    """
    return index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)


def choose(logits: Tensor, noise: Tensor | None, gradient: GateGradient) -> tuple[Tensor, Tensor]:
    """Choose experts by route = argmax softmax(logits + noise) (Sec. 3.1).

    Args:
        logits: the gates' logits for K experts, float32 [..., K].
        noise: of the same shape, added to the logits; None: no noise.
        gradient: how the gate gets its gradient (`model.gate_gradient`).

    Returns:
        The chosen expert, int64 [...], and a factor for its output, float32 [...], through which the gate gets its gradient.
        With p, the probability of the chosen expert, the factor is p / p.detach(), whose value is 1 (straight_through), the
        constant 1 (none), or p (scaled).
    """
    probability = torch.softmax(logits if noise is None else logits + noise, dim=-1)
    chosen = probability.detach().argmax(dim=-1)
    p = probability.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if gradient == "straight_through":
        return chosen, p / p.detach()
    return chosen, p if gradient == "scaled" else torch.ones_like(p)


def band_of_timestep_B(timestep_B: Tensor, num_experts: int, num_timesteps: int) -> Tensor:
    """Return the time expert of each sample's timestep, int64 [B] in 0 .. K-1, for `model.time_routing=boundaries`.

    The `num_timesteps` timesteps are divided into K = `num_experts` equal bands (subranges), one for each expert. This is
    not in the paper; Wan 2.2 has two such experts. Bands have equally many timesteps, not equal ranges of the
    signal-to-noise ratio. Training draws timesteps evenly, also for each group of ranks that share experts, so every expert
    gets about equally many samples.
    """
    return (timestep_B * num_experts // num_timesteps).long().clamp(0, num_experts - 1)


def balance_loss_B(logits_BYK: Tensor, chosen_BY: Tensor, taking_part_BY: Tensor | None = None) -> Tensor:
    """Compute the load-balance loss of the text gate for each sample: K sum_k f_k P_k (Fedus et al. 2021, Eq. 4).

    f_k is the share of the sample's text tokens that are routed to expert k, P_k their mean probability of expert k. The
    loss is 1 if all experts are used equally. It is computed per sample, so every division of a batch gives the same sum.
    The time gate makes one choice per sample, which cannot be balanced. `RaphaelUNet.time_balance_L` computes its loss.

    Args:
        logits_BYK: logits of the text gate for Y text tokens and K experts. All tensors can have the same further axes in
            front, such as one for the transformer blocks.
        chosen_BY: chosen expert of each text token, int64.
        taking_part_BY: bool, False for tokens that are left out, such as padding; None: all tokens count.

    Returns:
        The loss of each sample, float32 [B], with the further axes in front.
    """
    num_experts = logits_BYK.shape[-1]
    routed_BYK, probability_BYK = one_hot(chosen_BY, num_experts).float(), torch.softmax(logits_BYK, dim=-1)
    if taking_part_BY is None:
        share_BK, mean_BK = routed_BYK.mean(dim=-2), probability_BYK.mean(dim=-2)
    else:
        weight_BY1 = _mean_weight_BY(taking_part_BY).unsqueeze(-1)
        share_BK, mean_BK = (routed_BYK * weight_BY1).sum(dim=-2), (probability_BYK * weight_BY1).sum(dim=-2)
    return num_experts * (share_BK * mean_BK).sum(dim=-1)


def _mean_weight_BY(taking_part_BY: Tensor) -> Tensor:
    """Return weights with which a sum over a sample's text tokens is the mean over the counted ones, float32 [B, Y].

    The weight is 1 / (number of counted tokens) for counted tokens, else 0. `taking_part_BY`: bool, True for the tokens to
    count, False for others such as padding.
    """
    share_BY = taking_part_BY.float()
    return share_BY / share_BY.sum(dim=-1, keepdim=True).clamp(min=1)


def space_weights_BYK(chosen_BY: Tensor, factor_BY: Tensor, num_experts: int, taking_part_BY: Tensor | None) -> Tensor:
    """Return the weight of each text token for each expert: 1/n_y at the token's expert, else 0 (Sec. 3.1).

    n_y is the number of the sample's text tokens, without those that `taking_part_BY` leaves out.

    Args:
        chosen_BY: expert of each text token, int64. All tensors can have the same further axes in front, such as one for the
            transformer blocks.
        factor_BY: float32, the factor that `choose` returned. The weights are multiplied by it, so that the gate gets a
            gradient.
        num_experts: number of experts, K.
        taking_part_BY: bool, False for tokens that are left out, such as padding; their weights are 0. None: all tokens
            count.

    Returns:
        The weights, float32 [B, Y, K], with the further axes in front.
    """
    onehot_BYK = one_hot(chosen_BY, num_experts).to(factor_BY.dtype)
    if taking_part_BY is None:
        return onehot_BYK * (factor_BY / chosen_BY.shape[-1]).unsqueeze(-1)
    return onehot_BYK * (factor_BY * _mean_weight_BY(taking_part_BY)).unsqueeze(-1)


@torch.no_grad()
def region_mask_BNY(map_BNY: Tensor, threshold: float) -> Tensor:
    """Return each text token's region, Mhat of Sec. 3.1: float32 [B, N, Y] of ones and zeros, without a gradient.

    An image token is in the region of a text token if its attention to this token is at least `threshold` times the largest
    attention of any image token to it.

    Args:
        map_BNY: attention of each of N image tokens to each of Y text tokens.
        threshold: alpha of Sec. 3.1, 0..1.
    """
    map_BNY = map_BNY.float()
    return (map_BNY >= threshold * map_BNY.amax(dim=1, keepdim=True)).float()
