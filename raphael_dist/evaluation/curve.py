"""Plots two measures of image quality, e.g. CLIP score and Frechet distance, with a point for each guidance scale."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from raphael_dist.errors import UserError
from raphael_dist.evaluation.image_features import INSTALL
from raphael_dist.evaluation.study import Result
from raphael_dist.storage.files import replace_bytes


def require_matplotlib() -> None:
    """Raise UserError if matplotlib, with which `draw_curve` draws, is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "several --guidance values require the package matplotlib, which plots the scores, but it is not installed. "
            f"{INSTALL}"
        )


def draw_curve(results: Sequence[Result], path: Path, title: str) -> None:
    """Plot two measures of image quality, with a point for each guidance scale, and write the figure to `path` as PNG.

    The axes are the first two of these measures that `results` contain: CLIP score, Frechet distance, and share of images
    whose text an OCR engine reads without an error. If `results` contain only one of them, the x axis is the guidance scale.

    `results`: the measured values of each guidance scale. `title`: text above the figure.
    """
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
    data = io.BytesIO()
    figure.savefig(data, format="png")
    replace_bytes(path, data.getvalue(), durable=False)


def _axes(results: Sequence[Result]) -> list[tuple[str, list[float]]]:
    """Return (name, values) of the x axis and of the y axis, with a value for each of `results`."""
    columns: dict[str, list[float | None]] = {
        "CLIP score (higher is better)": [r.clip for r in results],
        "Frechet distance (lower is better)": [r.fid for r in results],
        "share of texts read exactly": [None if r.text is None else r.text.exact for r in results],
    }
    measured = [(name, [v for v in values if v is not None]) for name, values in columns.items() if None not in values]
    return measured[:2] if len(measured) > 1 else [("guidance", [r.guidance for r in results]), *measured]
