"""The trade-off between being true to pictures and to captions, over the weights of the guidance, as a figure."""

from collections.abc import Sequence
from pathlib import Path

from raphael_dist.errors import UserError
from raphael_dist.evaluation.features import INSTALL
from raphael_dist.evaluation.study import Result


def require_matplotlib() -> None:
    """Raise UserError when figures of curves cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"the trade-off curve needs matplotlib: {INSTALL}") from None


def draw_curve(results: Sequence[Result], path: Path, title: str) -> None:
    """Write FID against CLIP score, a point for each guidance; without both, what there is against the guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (x_name, x), (y_name, y) = _axes(results)
    figure = Figure(figsize=(5.5, 4.2), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, y, marker="o", color="#0072b2")
    for result, at_x, at_y in zip(results, x, y, strict=True):
        axes.annotate(f"{result.guidance:g}", (at_x, at_y), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_title(title, fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, format="png")


def _axes(results: Sequence[Result]) -> list[tuple[str, list[float]]]:
    """Return name and values of both axes."""
    known = {
        "CLIP score (higher is better)": [r.clip for r in results],
        "Frechet distance (lower is better)": [r.fid for r in results],
        "share of texts read as asked for": [r.text_exact for r in results],
    }
    there = [(name, [v for v in values if v is not None]) for name, values in known.items() if None not in values]
    return there[:2] if len(there) > 1 else [("guidance", [r.guidance for r in results]), *there]
