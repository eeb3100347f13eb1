"""Draws a contact sheet: training images next to their edge maps, with the captions below."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from raphael_dist.data.fonts import Font, drawable
from raphael_dist.data.shards.decode_sample import DecodedSample

CELL = 192  # pixels of an image's longer side
_GAP, _LINE, _LINES = 8, 14, 3


def contact_sheet(samples: Sequence[tuple[DecodedSample, str]], columns: int = 4) -> Image.Image:
    """Draw samples in a grid, as one RGB image: each with its edge map to the right, if any, and its caption below.

    `samples`: (decoded sample, caption to show) of each. `columns`: number of samples in a row of the grid.
    """
    with_edges = any(sample.edge is not None for sample, _ in samples)
    width, height = CELL * (2 if with_edges else 1) + _GAP, CELL + _LINES * _LINE + _GAP
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (sample, caption) in enumerate(samples):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        image = _fit_cell(Image.fromarray(sample.image.transpose(1, 2, 0)))
        sheet.paste(image, (left, top))
        draw.rectangle((left, top, left + image.width - 1, top + image.height - 1), outline="lightgrey")
        if sample.edge is not None:
            sheet.paste(_fit_cell(Image.fromarray(sample.edge)), (left + CELL, top))
        caption, font = drawable(caption, 12)
        text = "\n".join(_wrap(caption, width - _GAP, font))
        draw.multiline_text((left, top + CELL + 1), text, fill="black", font=font, spacing=1)
    return sheet


def _fit_cell(image: Image.Image) -> Image.Image:
    """Resize an image so that its longer side has CELL (192) pixels. Small images are enlarged without smoothing."""
    scale = CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Wrap a text to at most 3 lines of at most `width` pixels each. An ellipsis marks omitted lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = [_truncate(line, width, font) for line in lines[:_LINES]]
    return [*shown[:-1], f"{shown[-1]} ..."] if len(lines) > _LINES else shown


def _truncate(line: str, width: int, font: Font) -> str:
    lengths = np.cumsum([font.getlength(char) for char in line])
    return line[: int(np.searchsorted(lengths, width, side="right"))]
