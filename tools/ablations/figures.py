"""Figures of a campaign: the variants beside each other, and the loss over each number that was varied."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ablations.results import Interval, Summary
from ablations.variants import Base
from raphael_dist.storage.files import atomic_path

CURVES = {
    "experts": ("model.space_experts", "space experts"),
    "alpha": ("model.mask_threshold", "alpha (model.mask_threshold)"),
    "edges": ("edge.max_timestep", "T_c (edge.max_timestep)"),
}
COLOUR, LOSS = "#0072b2", "held-out loss"


def draw(base: Base, summaries: Sequence[Summary], out: Path) -> list[Path]:
    """Write variants.png, and a curve for each number of which there are two values; return the files."""
    known = [summary for summary in summaries if summary.loss is not None]
    drawn = [_variants(known, out / "variants.png")] if known else []
    for name, (field, label) in CURVES.items():
        section, key = field.split(".")
        points = {}
        for summary in known:
            if set(summary.overrides) <= {field}:
                points[getattr(getattr(base.config(summary.overrides), section), key)] = summary.loss
        if len(points) > 1:
            drawn.append(_curve(sorted(points.items()), label, out / f"{name}.png"))
    return drawn


def _variants(summaries: Sequence[Summary], path: Path) -> Path:
    """Draw losses at the left, differences to `full` at the right."""
    figure = Figure(figsize=(9.0, 1.2 + 0.32 * len(summaries)), dpi=120)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, summary in enumerate(summaries):
        _point(left, summary.loss, row)
        _point(right, summary.difference, row)
    left.set_yticks(range(len(summaries)), [summary.what for summary in summaries])
    left.invert_yaxis()
    left.set_xlabel(LOSS)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_xlabel("difference to the whole model, same seeds")
    return _save(figure, (left, right), path)


def _point(axes: Axes, found: Interval | None, row: int) -> None:
    if found is not None:
        axes.errorbar(found.mean, row, xerr=found.half, fmt="o", color=COLOUR, capsize=3)


def _curve(points: Sequence[tuple[float, Interval | None]], label: str, path: Path) -> Path:
    figure = Figure(figsize=(4.8, 3.4), dpi=120)
    axes = figure.subplots()
    known = [(x, y) for x, y in points if y is not None]
    half = [y.half or 0.0 for _, y in known]
    axes.errorbar([x for x, _ in known], [y.mean for _, y in known], yerr=half, marker="o", color=COLOUR, capsize=3)
    axes.set_xlabel(label)
    axes.set_ylabel(LOSS)
    return _save(figure, (axes,), path)


def _save(figure: Figure, all_axes: Sequence[Axes], path: Path) -> Path:
    FigureCanvasAgg(figure)
    for axes in all_axes:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
