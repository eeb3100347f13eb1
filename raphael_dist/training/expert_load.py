"""Metrics of how evenly work is divided over experts, and the warning about experts that get almost none.

Legend: L transformer blocks, K experts.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from raphael_dist.analysis.experts import DEAD_SHARE

REMEDY = "Set model.balance_weight=0.01, or raise it; docs/metrics.md defines moe/dead_experts."


def load_metrics(prefix: str, load_LK: Tensor, total_samples: float | None = None) -> dict[str, float]:
    """Return scalars by tag that describe how evenly work is divided over experts, in total and for each block.

    `load_max` and `load_min` are the largest and the smallest load of an expert, divided by the mean load of its block.
    `load_entropy` is the result of the function `load_entropy`. `density` is the share of all (image token, expert) pairs
    that are computed.

    Args:
        prefix: first part of the tags, e.g. "moe/space".
        load_LK: work of expert k in transformer block l. Time experts: number of samples. Space experts: the sum over
            samples of the share of image tokens that need the expert.
        total_samples: number of samples in `load_LK`, for the `density` of space experts. None: no `density`.
    """
    share_LK = relative_load(load_LK)
    values = {f"{prefix}/load_max": float(share_LK.max()), f"{prefix}/load_min": float(share_LK.min())}
    values[f"{prefix}/load_entropy"] = load_entropy(share_LK)
    if total_samples:
        values[f"{prefix}/density"] = float(load_LK.mean() / total_samples)
    for layer, (load_K, relative) in enumerate(zip(load_LK, share_LK, strict=True)):
        values[f"{prefix}/L{layer:02d}/load_max"] = float(relative.max())
        values[f"{prefix}/L{layer:02d}/load_min"] = float(relative.min())
        if total_samples:
            values[f"{prefix}/L{layer:02d}/density"] = float(load_K.mean() / total_samples)
    return values


def relative_load(load_LK: Tensor) -> Tensor:
    """Return each expert's load (in any unit), divided by the mean load of its block; 1 means an even share.

    Argument and result are [L, K] for L transformer blocks with K experts each.
    """
    return load_LK / load_LK.mean(dim=1, keepdim=True).clamp(min=1e-12)


def load_entropy(share_LK: Tensor) -> float:
    """Return the normalised entropy of the expert loads, averaged over blocks: 1 if even, 0 if one expert has all work.

    `share_LK`: the result of `relative_load`.
    """
    experts = share_LK.shape[1]
    p_LK = (share_LK / experts).clamp(min=1e-12)
    return float(-(p_LK * p_LK.log()).sum(dim=1).mean() / math.log(experts)) if experts > 1 else 1.0


class DeadExperts:
    """Detects experts that get almost no work, and creates a warning with a remedy.

    An expert is dead if its load is below 1% (DEAD_SHARE) of the mean load of its block. The loads of the last log lines are
    added up, as many lines as are needed for 100 samples per expert.
    """

    SAMPLES = 100

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
        self._warned: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget the loads of earlier log lines."""
        self._lines.clear()

    def find(self, kind: str, load_LK: Tensor, samples: float) -> Tensor | None:
        """Add the expert loads of one log line; return which experts are dead, bool [L, K]; None: too few samples yet.

        Args:
            kind: "space" or "time".
            load_LK: as for `load_metrics`.
            samples: number of samples in `load_LK`.
        """
        lines, needed = self._lines[kind], self.SAMPLES * load_LK.shape[1]
        lines.append((load_LK, samples))
        while sum(count for _, count in lines[1:]) >= needed:
            del lines[0]
        if sum(count for _, count in lines) < needed:
            return None
        return relative_load(torch.stack([load for load, _ in lines]).sum(dim=0)) < DEAD_SHARE

    def warning(self, kind: str, dead_LK: Tensor) -> str | None:
        """Return a warning about the dead experts of a kind ("space" or "time"), or None. `dead_LK`: the result of `find`.

        None if no expert is dead, or if their number has not doubled since the last warning.
        """
        count = int(dead_LK.sum())
        if count == 0 or count < 2 * self._warned[kind]:
            return None
        self._warned[kind] = count
        blocks = ", ".join(str(block) for block in dead_LK.any(dim=1).nonzero().flatten().tolist())
        return (
            f"{count} of {dead_LK.numel()} {kind} experts are dead: each gets under {DEAD_SHARE:.0%} of the mean load of "
            f"its block (blocks {blocks}). {REMEDY}"
        )
