"""Finds transformer blocks with dead or overloaded experts from the expert loads in a run's metrics."""

import re
from collections.abc import Callable

from raphael_dist.analysis.expert_diagnostics import DEAD_SHARE
from raphael_dist.reporting.run_files import RunFiles

OVERLOADED = 0.9  # as a share of a block's load
MIN_SAMPLES = 20.0  # per expert between two log lines, if the load were even; with fewer, loads are not judged
LAYER = re.compile(r"moe/(space|time)/L(\d{1,6})/load_(min|max)")  # a metric of one transformer block


def dead_blocks(run: RunFiles) -> dict[str, list[int]]:
    """Return the numbers of the transformer blocks with a dead expert, by kind of expert ("space" or "time").

    A dead expert gets almost no work. A block is listed if the smallest load of its experts is below 1% (DEAD_SHARE) of
    their mean load in each of the last log lines. The last fifth of the lines is used, at least three, because loads of few
    lines are noisy. The result has no entry for a kind without such a block.
    """
    return _blocks(run, "min", lambda load, experts: load < DEAD_SHARE)


def overloaded_blocks(run: RunFiles) -> dict[str, list[int]]:
    """Return the numbers of the transformer blocks with an overloaded expert, by kind of expert ("space" or "time").

    An overloaded expert gets more than 90% (OVERLOADED) of the work of its block. A block is listed if it has one in each of
    the last log lines: the last fifth of the lines, at least three. The result has no entry for a kind without such a block.
    """
    return _blocks(run, "max", lambda load, experts: load > OVERLOADED * experts)


def _blocks(run: RunFiles, end: str, is_bad: Callable[[float, float], bool]) -> dict[str, list[int]]:
    blocks_by_kind: dict[str, list[int]] = {}
    for tag, series in run.series.items():
        match = LAYER.fullmatch(tag)
        if match is None or match[3] != end or len(series) < 3:
            continue
        experts = run.number(f"model.{match[1]}_experts") or 1
        recent = series[-max(3, len(series) // 5) :]
        if experts_are_judged(run, match[1]) and all(is_bad(load, experts) for _, load in recent):
            blocks_by_kind.setdefault(match[1], []).append(int(match[2]))
    return {kind: sorted(blocks) for kind, blocks in sorted(blocks_by_kind.items())}


def experts_are_judged(run: RunFiles, kind: str) -> bool:
    """Return whether a run has enough training samples between two log lines to judge the logged loads of its experts.

    At least 20 samples per expert (MIN_SAMPLES) are enough. With fewer, an expert may get no work by chance. Returns False
    for a run that has logged no loads of experts of this kind. `kind`: kind of experts, "space" or "time".
    """
    experts = run.number(f"model.{kind}_experts") or 1
    samples = (run.number("train.log_every") or 1) * (run.number("train.global_batch_size") or 1)
    return f"moe/{kind}/load_min" in run.series and experts > 1 and samples >= experts * MIN_SAMPLES
