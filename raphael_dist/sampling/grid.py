"""Arranges images with captions in a grid."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raphael_dist.data.fonts import drawable
from raphael_dist.storage.files import replace_bytes

_COLUMNS = 6


def caption_grid(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Return one image that shows `images` in a grid, row by row in up to 6 columns, each with its caption below.

    The images are uint8 [H, W, 3] and may differ in size. If no image is more than 64 pixels wide, all are enlarged by the
    same whole factor, to at most 128 pixels.
    """
    count, height, width = len(images), max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    columns, scale = min(_COLUMNS, count), max(1, 128 // width)
    cell_w, cell_h, text_h = width * scale + 12, height * scale + 44, 34
    grid = Image.new("RGB", (columns * cell_w, -(-count // columns) * cell_h), "white")
    draw = ImageDraw.Draw(grid)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * cell_w + 6, (i // columns) * cell_h + 4
        size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
        grid.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), (x, y))
        caption, font = drawable(caption, 11)
        for row, line in enumerate(_wrap(caption, draw, font, cell_w - 6)[: text_h // 14]):
            draw.text((x, y + height * scale + 3 + 14 * row), line, fill="black", font=font)
    return grid


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image to a file, in the format that its suffix (such as .png) names. Missing folders are created."""
    data = io.BytesIO()
    image.save(data, Image.registered_extensions()[path.suffix.lower()])
    replace_bytes(path, data.getvalue(), durable=False)
