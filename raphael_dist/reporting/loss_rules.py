"""Rules of `raphael_dist doctor` about the training loss: not finite, not falling, or rising again after it has fallen."""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from raphael_dist.reporting.evidence import MIN_LINES, Finding, RunEvidence
from raphael_dist.reporting.run_files import RunFiles, Series
from raphael_dist.text import counted

FALLEN = 0.95  # a loss has fallen if it is below this share of its first values
RISEN = 0.2  # a loss has risen if its median exceeds that of the lowest eighth of the log lines by more than this share,
DEVIATIONS = 4  # and by more than so many standard errors of the difference of the two medians


@dataclass(frozen=True)
class Rise:
    """A loss that fell and has risen again.

    Attributes:
        lowest: the smallest median of the loss in an eighth of the log lines.
        step: the last step of the eighth with this median.
        end: median of the loss in the last eighth.
    """

    lowest: float
    step: int
    end: float


def loss_not_finite(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if a logged training loss is infinite or NaN, else None."""
    bad = [step for step, loss in evidence.run.series.get("train/loss", []) if not math.isfinite(loss)]
    if not bad:
        return None
    text = f"the loss was not finite at {counted(len(bad), 'logged step')}, first at step {bad[0]}"
    return Finding(text, "lower optim.lr")


def loss_not_falling(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the training loss is not lower at the end than at the start, else None.

    It is not lower if the mean of the last quarter of the log lines is at least 95% of the mean of the first tenth. A loss
    that fell and has risen again is reported by `loss_rising` instead.
    """
    losses = evidence.run.values("train/loss")
    if len(losses) < MIN_LINES or find_rise(evidence.run) is not None:
        return None
    begin, end = fmean(losses[: max(2, len(losses) // 10)]), fmean(losses[-(len(losses) // 4) :])
    if end < FALLEN * begin:
        return None
    return Finding(
        f"the training loss does not fall: {begin:.3g} at the start, {end:.3g} in the last quarter",
        "check optim.lr (too high or too low), the captions and images (python -m raphael_dist prepare), and run.init_from",
    )


def loss_rising(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the training loss fell, but has risen again at the end, else None."""
    rise = find_rise(evidence.run)
    if rise is None:
        return None
    return Finding(
        f"the training loss rises again: {rise.lowest:.3g} up to step {rise.step}, {rise.end:.3g} in the last eighth of the "
        "log lines",
        f"lower optim.lr, and start again from a checkpoint near step {rise.step}",
    )


def find_rise(run: RunFiles) -> Rise | None:
    """Return where the training loss of a run was lowest, if it fell before and has risen again since; else None.

    The log lines are divided into eighths of at least three lines. The medians of these parts are compared, so that a single
    spike does not count. Lines of earlier stages of training (train.stages) are left out, because stages of other image
    sizes have other losses.
    """
    series = [(step, loss) for step, loss in _last_stage(run) if math.isfinite(loss)]
    size = max(3, len(series) // 8)
    parts = [series[start : start + size] for start in range(0, len(series) - 2 * size + 1, size)]
    if len(series) < MIN_LINES or not parts:
        return None
    lowest = min(parts, key=_median)
    low, end = _median(lowest), _median(series[-size:])
    has_fallen = low < FALLEN * median(loss for _, loss in series[: max(2, len(series) // 10)])
    if not has_fallen or end - low <= max(RISEN * abs(low), DEVIATIONS * _standard_error(series, size)):
        return None
    return Rise(low, lowest[-1][0], end)


def _last_stage(run: RunFiles) -> Series:
    """Return the training losses of the stage of training (entry of train.stages) that the run has reached."""
    stages = run.option("train.stages") or []
    ends = [stage.get("until") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    since = max((end for end in ends if isinstance(end, int) and end < run.step), default=0)
    return [(step, loss) for step, loss in run.series.get("train/loss", []) if step > since]


def _median(part: Series) -> float:
    return median(loss for _, loss in part)


def _standard_error(series: Series, size: int) -> float:
    """Return the standard error of the difference of two medians of `size` losses each.

    The noise is estimated from the last half of the losses, as the differences between consecutive losses. The trend of
    the loss hardly changes these differences.
    """
    recent = series[-max(MIN_LINES, len(series) // 2) :]
    deviation = median(abs(b - a) for (_, a), (_, b) in pairwise(recent)) / 0.954  # of normal noise
    return 1.2533 * deviation * math.sqrt(2 / size)
