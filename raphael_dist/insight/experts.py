"""Experts that do nothing, and experts that do the same as another.

Shape legend: L transformer blocks, K experts, R rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.model.experts import Experts
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.unet import RaphaelUNet

DEAD = 0.02  # of an even share
SAME = 0.05  # relative distance of two experts' outputs


@dataclass(frozen=True)
class Finding:
    """An expert that is dead (`other` None; `value` is its share relative to an even one), or that does the same as another
    (`value` is the relative distance of their outputs)."""

    kind: str
    block: int
    expert: int
    other: int | None
    value: float

    def __str__(self) -> str:
        if self.other is None:
            return f"{self.kind} expert {self.expert} of block {self.block} is dead: {self.value:.3f} of an even share"
        return (
            f"{self.kind} experts {self.expert} and {self.other} of block {self.block} do the same: {self.value:.3f} apart"
        )


def loads(route: Tensor, num_experts: int) -> Tensor:
    """Return the share of each expert in routes [L, ...], relative to an even share, float32 [L, K]."""
    counts = torch.stack([torch.bincount(row.flatten(), minlength=num_experts) for row in route]).float()
    return counts * num_experts / counts.sum(dim=1, keepdim=True)


def dead(kind: str, load_LK: Tensor) -> list[Finding]:
    """Return the experts with less than DEAD of an even share."""
    return [Finding(kind, block, k, None, float(load_LK[block, k])) for block, k in (load_LK < DEAD).nonzero().tolist()]


@torch.no_grad()
def duplicates(model: RaphaelUNet, rows: int = 256) -> list[Finding]:
    """Return the pairs of experts of a layer whose outputs are alike, on normally distributed inputs, as after a LayerNorm.

    Their distance is ||e_j - e_k|| / max(||e_j||, ||e_k||) over outputs less their mean over all inputs; two experts of zero
    output are alike.
    """
    found, blocks = [], ordered_blocks(model)
    for number, block in enumerate(blocks):
        for kind, layer in (("space", block.space_moe), ("time", getattr(block, "time_moe", None))):
            if layer is not None:
                distance_KK = _distances(layer, rows)
                for j, k in (distance_KK < SAME).triu(1).nonzero().tolist():
                    found.append(Finding(kind, number, j, k, float(distance_KK[j, k])))
    return found


def _distances(layer: Experts, rows: int) -> Tensor:
    weight = layer.w1
    x_RD = torch.randn(rows, layer.dim, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    counts = torch.full((layer.num_experts,), rows, device=weight.device)
    y_KRD = layer.apply_sorted(x_RD.repeat(layer.num_experts, 1), counts).float().view(layer.num_experts, rows, -1)
    y_KRD = y_KRD - y_KRD.mean(dim=1, keepdim=True)
    norm_K = y_KRD.flatten(1).norm(dim=1)
    apart_KK = torch.cdist(y_KRD.flatten(1), y_KRD.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return apart_KK / torch.maximum(norm_K[:, None], norm_K[None]).clamp(min=1e-12)


def ordered_blocks(model: RaphaelUNet) -> list[TransformerBlock]:
    """Return the transformer blocks in order of execution: down, middle, up."""
    stages = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [m for stage in stages for m in stage.modules() if isinstance(m, TransformerBlock)]
