"""Pieces of HTML for the report. All text passes through `text_html`, which escapes it and hides secrets."""

from collections.abc import Sequence
from html import escape

from raphael_dist.reporting.run_files import RunFiles
from raphael_dist.text import hide_secrets_in_text

MAX_CELL = 400  # characters
MAX_ROWS = 1000  # of a table
Row = tuple[str, Sequence[object]]  # (CSS class, cells)


def text_html(text: object, limit: int | None = None) -> str:
    """Return a text as HTML, without secrets. `limit`: largest number of its characters that are shown; None: all."""
    shown = hide_secrets_in_text(str(text))
    if limit is not None and len(shown) > limit:
        shown = f"{shown[:limit]}... ({len(shown)} characters)"
    return escape(shown).encode(errors="backslashreplace").decode()  # names of files may not be Unicode


def sentence(text: str) -> str:
    """Return a text as an HTML paragraph."""
    return f"<p>{text_html(text)}</p>"


def heading(runs: Sequence[object], run: RunFiles) -> str:
    """Return the name of a run as an HTML heading; "" if it is the only run of the report.

    `runs`: all runs of the report. `run`: one of them.
    """
    return f"<h3>{text_html(run.name)}</h3>" if len(runs) > 1 else ""


def table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """Return an HTML table of the first MAX_ROWS rows; a sentence after it states how many are left out.

    Numbers are aligned to the right.

    `header`: names of the columns. `rows`: (CSS class, cells) of each row.
    """
    head = "".join(f"<th>{text_html(cell, MAX_CELL)}</th>" for cell in header)
    lines = []
    for css, cells in rows[:MAX_ROWS]:
        inner = "".join(f"<td{' class=n' if _is_number(cell) else ''}>{text_html(cell, MAX_CELL)}</td>" for cell in cells)
        lines.append(f'<tr class="{css}">{inner}</tr>' if css else f"<tr>{inner}</tr>")
    rest = sentence(f"{len(rows) - MAX_ROWS:,} more rows are left out.") if len(rows) > MAX_ROWS else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{rest}'


def _is_number(cell: object) -> bool:
    return str(cell).replace(".", "").replace(",", "").replace("-", "").isdigit()
