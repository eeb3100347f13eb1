"""Draws the figures of an ablation campaign: a comparison of all variants, and their curves.

A campaign trains variants of one base configuration. The variant `full` is the base configuration itself.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ablations.results import ROUTING, Interval, RunResult, Summary, interval
from raphael_dist.storage.files import atomic_path

COLOUR, LOSS = "#0072b2", "held-out loss"
COLOURS = colormaps["tab20"]  # of curves: ten dark colours, each followed by a light one of the same hue


def draw_variants(summaries: Sequence[Summary], out: Path) -> None:
    """Write variants.png: the loss of each variant (left), and its difference to that of `full` (right).

    Variants without a loss are left out; if none has a loss, nothing is written. `out`: the folder of the file.
    """
    known = [summary for summary in summaries if summary.loss is not None]
    if not known:
        return
    figure = Figure(figsize=(9.0, 1.2 + 0.32 * len(known)), dpi=120)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, summary in enumerate(known):
        _point(left, summary.loss, row)
        _point(right, summary.difference, row)
    left.set_yticks(range(len(known)), [summary.what for summary in known])
    left.invert_yaxis()
    left.set_xlabel(LOSS)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_xlabel("difference to the full model, same seeds")
    _save(figure, (left, right), out / "variants.png")


def draw_curves(runs: Sequence[RunResult], out: Path) -> None:
    """Write curves.png: losses and gate statistics of each variant against the number of images seen.

    One panel shows each variant's loss minus that of the variant `full`, the base configuration. Curves are means over
    seeds.
    """
    panels = [("val/loss", LOSS), ("", "difference to `full`, 95%"), *((tag, tag) for tag in ROUTING)]
    figure = Figure(figsize=(14.0, 9.0), dpi=100)
    all_axes = list(figure.subplots(3, 4).flat)
    full = {run.seed: dict(run.curves["val/loss"]) for run in runs if run.variant == "full" and run.curves}
    for number, name in enumerate(dict.fromkeys(run.variant for run in runs if run.curves)):
        own = [run for run in runs if run.variant == name and run.curves]
        for axes, (tag, label) in zip(all_axes, panels, strict=True):
            axes.set_title(label, fontsize=9)
            if tag:
                curves = [dict(run.curves.get(tag, ())) for run in own]
            else:
                curves = [_minus(dict(run.curves["val/loss"]), full[run.seed]) for run in own if run.seed in full]
            _band(axes, curves, to_hex(COLOURS((2 * number + number // 10) % 20)), name)
    figure.supxlabel("thousands of images seen", fontsize=9)
    all_axes[0].set_yscale("log")
    all_axes[0].legend(fontsize=7, ncol=2)
    _save(figure, all_axes, out / "curves.png")


def _minus(curve: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    return {x: curve[x] - other[x] for x in curve if x in other}


def _band(axes: Axes, curves: Sequence[dict[int, float]], colour: str, label: str) -> None:
    """Draw the mean of curves ({images seen: value}) and its 95% interval over thousands of images."""
    points = (
        {x: interval([curve[x] for curve in curves]) for x in sorted(set.intersection(*map(set, curves)))} if curves else {}
    )
    known = [(x / 1000, y.mean, y.half or 0.0) for x, y in points.items() if y is not None]
    axes.plot([x for x, _, _ in known], [y for _, y, _ in known], color=colour, label=label, linewidth=1)
    axes.fill_between(
        [x for x, _, _ in known], [y - h for _, y, h in known], [y + h for _, y, h in known], color=colour, alpha=0.15
    )


def _point(axes: Axes, point: Interval | None, row: int) -> None:
    if point is not None:
        axes.errorbar(point.mean, row, xerr=point.half, fmt="o", color=COLOUR, capsize=3)


def _save(figure: Figure, all_axes: Sequence[Axes], path: Path) -> None:
    FigureCanvasAgg(figure)
    for axes in all_axes:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
