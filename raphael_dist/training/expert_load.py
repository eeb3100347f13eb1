"""Metrics of how evenly work is divided over experts, and the warning about experts that get almost none.

Legend: L transformer blocks, K experts.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from raphael_dist.analysis.expert_diagnostics import DEAD_SHARE

REMEDY = "Set model.balance_weight=0.01, or raise it; docs/metrics.md defines moe/dead_experts."


def load_metrics(prefix: str, load_LK: Tensor, total_samples: float | None = None) -> dict[str, float]:
    """Return metrics of how evenly work is divided over experts, from metric name (e.g. "moe/space/load_max") to value.

    - load_max, load_min: largest and smallest load of an expert in all blocks. Each load is divided by the mean load of its
      block first. 1 is an even share.
    - load_entropy: entropy of the loads within a block, mean over blocks. 1 is an even share, 0 means that one expert of
      each block has all the work.
    - density: share (0..1) of all (image token, expert) pairs that are computed. It is returned only with `total_samples`.

    All but load_entropy are also returned for each block, e.g. as "moe/space/L00/load_max".

    Args:
        prefix: first part of the names: "moe/space" or "moe/time".
        load_LK: float [L, K], the work of each of K experts in each of L transformer blocks. For time experts it is a
            number of samples. For space experts, each sample adds the share of its image tokens that the expert processes.
        total_samples: number of training samples that caused these loads. None: no density is returned. Pass None for time
            experts: a sample uses exactly one of them in each block, so their density would always be 1 / K.
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
    """Return each expert's load, divided by the mean load of its block; 1 means an even share.

    Args:
        load_LK: load in any unit, [L, K] for L transformer blocks with K experts each.

    Returns:
        The relative loads, [L, K].
    """
    return load_LK / load_LK.mean(dim=1, keepdim=True).clamp(min=1e-12)


def load_entropy(share_LK: Tensor) -> float:
    """Return the entropy of the expert loads in a block, divided by its maximum log(K); the mean over all blocks.

    1: all experts of a block have equal loads. 0: one expert of each block has all the work.

    `share_LK`: float [L, K], loads of K experts in each of L blocks, divided by the mean load of the block.
    """
    experts = share_LK.shape[1]
    p_LK = (share_LK / experts).clamp(min=1e-12)
    return float(-(p_LK * p_LK.log()).sum(dim=1).mean() / math.log(experts)) if experts > 1 else 1.0


class DeadExperts:
    """Detects experts that get almost no work, and creates a warning with a remedy.

    An expert is dead if its load is below 1% (DEAD_SHARE) of the mean load of its transformer block. Loads are recorded each
    time that the run logs metrics. The most recent records are summed, as many as are needed for 100 training samples per
    expert. With fewer samples, an expert could get no work by chance.
    """

    SAMPLES = 100

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
        self._warned: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget all loads that `find` has recorded. Call this when the run returns to an earlier step."""
        self._lines.clear()

    def find(self, kind: str, load_LK: Tensor, samples: float) -> Tensor | None:
        """Record the expert loads since the last call; return which experts are dead (get almost no work), bool [L, K].

        Returns None while fewer than 100 samples per expert (SAMPLES) have been recorded.

        Args:
            kind: kind of experts, "space" or "time". Their loads are recorded separately.
            load_LK: the load (amount of work, in any unit) of each of K experts in each of L transformer blocks, float.
            samples: number of training samples that caused these loads.
        """
        lines, needed = self._lines[kind], self.SAMPLES * load_LK.shape[1]
        lines.append((load_LK, samples))
        while sum(count for _, count in lines[1:]) >= needed:
            del lines[0]
        if sum(count for _, count in lines) < needed:
            return None
        return relative_load(torch.stack([load for load, _ in lines]).sum(dim=0)) < DEAD_SHARE

    def warning(self, kind: str, dead_LK: Tensor) -> str | None:
        """Return a warning for the log about dead experts (they get almost no work), with a remedy.

        Returns None if no expert is dead, or if fewer than twice as many are dead as at the last warning.

        Args:
            kind: kind of experts, "space" or "time".
            dead_LK: whether each of K experts in each of L transformer blocks is dead, bool; the result of `find`.
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
