"""Finds experts that get almost no work (dead), and pairs of experts with nearly equal outputs (duplicates).

Shape legend: L transformer blocks, K experts, R random inputs, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.model.experts import Experts
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.unet import RaphaelUNet

DEAD_SHARE = 0.01  # of the mean load of a block; below it an expert is dead, in training, reports and routes
DUPLICATE_DISTANCE = 0.05  # relative distance of two experts' outputs


@dataclass(frozen=True)
class Finding:
    """A dead expert (it gets almost no work), or a pair of duplicate experts (their outputs are nearly equal).

    Attributes:
        kind: "space" or "time".
        block: number of the transformer block.
        expert: number of the expert in this block.
        other: the second expert of a pair; None: the expert is dead.
        value: load divided by the mean load of the block (dead), or relative distance of the outputs (duplicates).
    """

    kind: str
    block: int
    expert: int
    other: int | None
    value: float

    def __str__(self) -> str:
        if self.other is None:
            return f"{self.kind} expert {self.expert} of block {self.block} is dead: {self.value:.3f} of an even share"
        pair = f"{self.kind} experts {self.expert} and {self.other} of block {self.block}"
        return f"{pair} are duplicates: relative distance {self.value:.3f}"


def expert_loads(route: Tensor, num_experts: int) -> Tensor:
    """Return the load of each of K experts in each of L blocks, divided by the block's mean load, float32 [L, K].

    The load is the number of tokens or timesteps for which the expert was chosen. 1 is an even share.

    `route`: int64 [L, ...], the chosen expert of each token or timestep in each block. `num_experts`: K.
    """
    counts = torch.stack([torch.bincount(row.flatten(), minlength=num_experts) for row in route]).float()
    return counts * num_experts / counts.sum(dim=1, keepdim=True)


def find_dead(kind: str, load_LK: Tensor) -> list[Finding]:
    """Return the dead experts: those whose load is below 1% (DEAD_SHARE) of the mean load of their block.

    `kind`: kind of these experts, "space" or "time". `load_LK`: load of each of K experts in each of L blocks, divided by
    the mean load of the block, float.
    """
    dead = (load_LK < DEAD_SHARE).nonzero().tolist()
    return [Finding(kind, block, k, None, float(load_LK[block, k])) for block, k in dead]


@torch.no_grad()
def find_duplicates(model: RaphaelUNet, rows: int = 256) -> list[Finding]:
    """Return the pairs of experts in the same layer of the model whose outputs are nearly equal.

    All experts get the same random inputs: `rows` vectors from a normal distribution, as after a LayerNorm. The mean over
    the inputs is subtracted from each expert's outputs e. The distance of experts j and k is ||e_j - e_k|| / max(||e_j||,
    ||e_k||). The experts are duplicates if their distance is below 0.05 (DUPLICATE_DISTANCE). Two experts whose outputs are
    zero are duplicates, too.
    """
    findings = []
    for number, block in enumerate(ordered_blocks(model)):
        for kind, layer in (("space", block.space_moe), ("time", getattr(block, "time_moe", None))):
            if layer is not None:
                distance_KK = _distances(layer, rows)
                for j, k in (distance_KK < DUPLICATE_DISTANCE).triu(1).nonzero().tolist():
                    findings.append(Finding(kind, number, j, k, float(distance_KK[j, k])))
    return findings


def _distances(layer: Experts, rows: int) -> Tensor:
    weight = layer.w1
    x_RD = torch.randn(rows, layer.dim, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    counts = torch.full((layer.num_experts,), rows, device=weight.device)
    y_KRD = layer.apply_sorted(x_RD.repeat(layer.num_experts, 1), counts).float().view(layer.num_experts, rows, -1)
    y_KRD = y_KRD - y_KRD.mean(dim=1, keepdim=True)
    norm_K = y_KRD.flatten(1).norm(dim=1)
    distance_KK = torch.cdist(y_KRD.flatten(1), y_KRD.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return distance_KK / torch.maximum(norm_K[:, None], norm_K[None]).clamp(min=1e-12)


def ordered_blocks(model: RaphaelUNet) -> list[TransformerBlock]:
    """Return the transformer blocks of the U-Net in the order in which they are executed: down, middle, up."""
    levels = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [module for level in levels for module in level.modules() if isinstance(module, TransformerBlock)]
