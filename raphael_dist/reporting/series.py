"""The charts of the HTML report: which metrics each shows, and their values, downsampled to fit into the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from raphael_dist.reporting.run_events import History
from raphael_dist.reporting.run_files import RunFiles, Series

BUCKETS = 250  # number of intervals of a curve; each has two points
MIN_BUCKETS = 8
POINTS = 60_000  # of all curves of a page together; they take about 1 MB


@dataclass(frozen=True)
class Chart:
    """A chart of the HTML report: which metrics it shows, without their values.

    Attributes:
        section: the section of the page, e.g. "loss".
        title: title of the chart.
        tags: label of each curve, by the name of its metric, e.g. "train/loss".
    """

    section: str
    title: str
    tags: dict[str, str]


class Curve(TypedDict):
    """A curve of a chart, as a dict that can be written as JSON.

    Attributes:
        label: text of the legend.
        x, y: coordinates of its points, two lists of equal length. None in `y` is a gap.
        kind: only in the curves of `timeline_data`: "step" (the steps of a run over time), "restart" or "fault" (points at
            the times of these events).
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    kind: NotRequired[str]


CHARTS = (
    Chart("loss", "Loss without weights", {"train/loss": "training", "val/loss": "validation"}),
    Chart("loss", "Validation loss by timestep", {f"val/loss_t{i}": f"quarter {i}" for i in range(4)}),
    Chart("loss", "Loss that the optimizer minimises", {"train/loss_weighted": "weighted", "train/loss_edge": "edges"}),
    Chart("loss", "Learning rate", {"optim/lr": "learning rate"}),
    Chart("loss", "Gradient norm before clipping", {"optim/grad_norm": "norm"}),
    Chart("speed", "Images per second", {"throughput/samples_per_s": "images/s"}),
    Chart(
        "speed",
        "Share of the time spent waiting for data",
        {"time/data_wait_frac": "all"} | {f"time/data_wait_{k}": k for k in ("reading", "decoding", "encoding", "copying")},
    ),
    Chart("speed", "Time of the slowest rank / median rank", {"time/slowest_rank_ratio": "ratio"}),
    Chart(
        "experts",
        "Entropy of the experts' loads (1: even)",
        {"moe/space/load_entropy": "space", "moe/time/load_entropy": "time"},
    ),
    Chart(
        "experts",
        "Entropy of the gates' probabilities (1: undecided, 0: certain)",
        {"moe/space/gate_entropy": "space", "moe/time/gate_entropy": "time"},
    ),
    Chart("experts", "Space experts: load / mean load", {f"moe/space/load_{e}": f"{e}imum" for e in ("max", "min")}),
    Chart("experts", "Time experts: load / mean load", {f"moe/time/load_{e}": f"{e}imum" for e in ("max", "min")}),
    Chart("experts", "Dead experts", {"moe/dead_experts": "experts"}),
    Chart("memory", "Peak memory of a rank, GiB", {"memory/peak_gib": "GiB"}),
)


def buckets_for(runs: Sequence[RunFiles]) -> int:
    """Return into how many intervals to divide each curve, so that all curves together have at most POINTS points.

    Of each interval, two points are shown: the points with the smallest and the largest value.
    """
    curves = sum(tag in run.series for chart in CHARTS for tag in chart.tags for run in runs)
    return min(BUCKETS, max(MIN_BUCKETS, POINTS // (2 * max(1, curves))))


def chart_data(chart: Chart, runs: Sequence[RunFiles], buckets: int = BUCKETS) -> list[Curve]:
    """Return the curves of a chart, one for each run and metric. x are steps, y are values of the metric.

    Long curves are downsampled to two points in each of `buckets` intervals. The result is [] if no run has values for the
    chart.
    """
    curves: list[Curve] = []
    for run in runs:
        for tag, label in chart.tags.items():
            if series := run.series.get(tag):
                steps, values = zip(*thinned(series, buckets), strict=True)
                name = f"{run.name}: {label}" if len(runs) > 1 else label
                curves.append({"label": name, "x": steps, "y": [round_(value) for value in values]})
    return curves


def timeline_data(histories: list[tuple[str, History]], buckets: int = BUCKETS) -> list[Curve]:
    """Return curves that show the progress of runs: y are steps, x are minutes since the run's first log line.

    There are up to three curves per run, whose "kind" is "step", "restart" or "fault". Each restart or fault is one point.
    A curve has at most two points for each of `buckets` intervals, as in `chart_data`: of a longer curve, every k-th point
    is kept.

    `histories`: for each run its name, and its history (steps, restarts and faults with their times). `buckets`: number of
    intervals into which the points of a curve are divided.
    """
    curves: list[Curve] = []
    for name, history in histories:
        begin = min([time for time, _ in history.progress] + [event.time for event in history.events], default=None)
        kinds = {
            "step": history.progress,
            "restart": [(event.time, event.step) for event in history.of("restart")],
            "fault": [(event.time, event.step) for event in history.faults],
        }
        for kind, points in kinds.items():
            if begin is None or not points:
                continue
            minutes = {round((time - begin).total_seconds() / 60, 3): step for time, step in points}
            thin = sorted(minutes.items())[:: -(-len(minutes) // (2 * buckets))]
            label = f"{name}: {kind}" if len(histories) > 1 else kind
            curves.append({"label": label, "x": [x for x, _ in thin], "y": [y for _, y in thin], "kind": kind})
    return curves


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """Return the points (step, value) of a series with the smallest and the largest value in each of `buckets` intervals.

    Therefore spikes stay visible. A series of at most 2 x `buckets` points is returned unchanged. Values that are not finite
    are left out of an interval that also has finite values.
    """
    size = -(-len(series) // buckets)
    if size <= 2:
        return series
    points: list[tuple[int, float]] = []
    for start in range(0, len(series), size):
        part = series[start : start + size]
        part = [point for point in part if math.isfinite(point[1])] or part[:1]
        points += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return points


def round_(value: float) -> float | None:
    """Return `value` rounded to five significant digits; None (drawn as a gap in a curve) if it is not finite."""
    return float(f"{value:.5g}") if abs(value) < float("inf") else None
