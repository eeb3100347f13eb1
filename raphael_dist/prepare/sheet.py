"""A contact sheet: pictures beside their edge maps, with the caption below, as they go into training."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raphael_dist.data.dataset import DecodedSample

CELL = 192  # pixels of a picture's longer side
_GAP, _LINE, _LINES = 8, 14, 3


def contact_sheet(samples: Sequence[tuple[DecodedSample, str]], columns: int = 4) -> Image.Image:
    """Return a sheet of (sample, caption), with the edge map to the right of each picture where there is one."""
    with_edges = any(sample.edge is not None for sample, _ in samples)
    width, height = CELL * (2 if with_edges else 1) + _GAP, CELL + _LINES * _LINE + _GAP
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (sample, caption) in enumerate(samples):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        picture = _fitted(Image.fromarray(sample.image.transpose(1, 2, 0)))
        sheet.paste(picture, (left, top))
        draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline="lightgrey")
        if sample.edge is not None:
            sheet.paste(_fitted(Image.fromarray(sample.edge)), (left + CELL, top))
        text = "\n".join(_wrapped(caption, width - _GAP, font))
        draw.multiline_text((left, top + CELL + 1), text, fill="black", font=font, spacing=1)
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """Return an image that fills a cell as far as its shape allows; small ones are enlarged without smoothing."""
    scale = CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Return the text in lines that are at most `width` pixels wide; dots stand for what is left out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = [_cut(line, width, font) for line in lines[:_LINES]]
    return [*kept[:-1], f"{kept[-1]} ..."] if len(lines) > _LINES else kept


def _cut(line: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    lengths = np.cumsum([font.getlength(char) for char in line])
    return line[: int(np.searchsorted(lengths, width, side="right"))]
