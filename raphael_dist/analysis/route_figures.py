"""Draws figures: the experts of words and timesteps, the image regions of words, and the loads of experts.

Shape legend: L transformer blocks, W words, K experts, T timesteps, H and W image height and width.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The first are distinguishable with red-green colour blindness (Okabe and Ito 2008).
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
    (240, 228, 66), (110, 110, 110), (120, 60, 20), (150, 120, 220), (60, 60, 160), (160, 200, 90),
)  # fmt: skip
_LINE, _GAP = 14, 4


def expert_colour(expert: int) -> tuple[int, int, int]:
    """Return the colour that stands for an expert in figures, as (red, green, blue), each 0..255.

    `expert`: number of the expert in its block, from 0. There are 12 colours; expert 12 has that of expert 0.
    """
    return COLOURS[expert % len(COLOURS)]


def draw_routes(words: Sequence[str], route_WL: np.ndarray, title: str) -> Image.Image:
    """Draw a table of W words (rows) and L transformer blocks (columns) that shows the space expert of each word.

    A cell has the number and the colour of the expert. `route_WL`: number of the expert of each word in each block, int
    [W, L]. `title`: text above the table.
    """

    def cell(word: int, block: int) -> tuple[tuple[int, int, int], str]:
        return expert_colour(int(route_WL[word, block])), str(route_WL[word, block])

    columns = [str(block) for block in range(route_WL.shape[1])]
    return _table(list(words), columns, cell, title)


def draw_heat_map(values_LK: np.ndarray, title: str) -> Image.Image:
    """Draw values [L, K] as a table: one row per transformer block, one column per expert, from white (0) to blue (2).

    `values_LK`: the load of each expert divided by the mean load of its block, so that 1 is an even share. `title`: text
    above the table.
    """

    def cell(block: int, expert: int) -> tuple[tuple[int, int, int], str]:
        value = float(values_LK[block, expert])
        depth = min(max(value, 0.0) / 2, 1.0)
        return (int(255 - 215 * depth), int(255 - 155 * depth), int(255 - 55 * depth)), f"{value:.2f}"

    rows, columns = ([str(i) for i in range(count)] for count in values_LK.shape)
    return _table(list(rows), list(columns), cell, title, width=34)


def _table(
    rows: list[str],
    columns: list[str],
    cell: Callable[[int, int], tuple[tuple[int, int, int], str]],
    title: str,
    width: int = 24,
) -> Image.Image:
    font = ImageFont.load_default(size=11)
    left = 10 + max([int(font.getlength(row)) for row in rows] or [0])
    size = (max(left + width * len(columns) + 6, int(font.getlength(title)) + 10), (len(rows) + 2) * 20 + 8)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), title, fill="black", font=font)
    for x, text in enumerate(columns):
        draw.text((left + width * x + width / 2, 30), text, fill="black", font=font, anchor="mm")
    for y, row in enumerate(rows):
        top = 40 + 20 * y
        draw.text((left - 6, top + 10), row, fill="black", font=font, anchor="rm")
        for x in range(len(columns)):
            colour, text = cell(y, x)
            draw.rectangle((left + width * x, top, left + width * (x + 1) - 2, top + 18), fill=colour)
            ink = "white" if sum(colour) < 380 else "black"
            draw.text((left + width * x + width / 2 - 1, top + 9), text, fill=ink, font=font, anchor="mm")
    return image


def draw_bands(route_LT: np.ndarray, timesteps: Sequence[float], title: str) -> Image.Image:
    """Draw which time expert each block uses at each timestep: a horizontal band per block, in the experts' colours.

    `route_LT`: int [L, T], number of the expert in each of L blocks at each of T timesteps. `timesteps`: the T timesteps in
    any order. In the figure timesteps, and with them the noise, increase to the right. `title`: text above the figure.
    """
    font, left, width, row = ImageFont.load_default(size=11), 30, 500, 16
    blocks, experts = route_LT.shape[0], int(route_LT.max()) + 1
    order = np.argsort(np.asarray(timesteps))
    palette = np.array([expert_colour(k) for k in range(experts)], np.uint8)
    strip = Image.fromarray(palette[route_LT[:, order]]).resize((width, blocks * row), Image.Resampling.NEAREST)
    image = Image.new("RGB", (left + width + 20, blocks * row + 78), "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), title, fill="black", font=font)
    image.paste(strip, (left, 24))
    for block in range(blocks):
        draw.text((left - 5, 24 + row * block + row / 2), str(block), fill="black", font=font, anchor="rm")
        draw.line((left, 24 + row * block, left + width, 24 + row * block), fill="white")
    low, high = min(timesteps), max(timesteps)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = f"{low + share * (high - low):.0f}"
        draw.text((left + share * width, 24 + blocks * row + 9), text, fill="black", font=font, anchor="mm")
    for expert in range(experts):
        x, y = left + 90 * (expert % 6), 24 + blocks * row + 24 + 16 * (expert // 6)
        draw.rectangle((x, y, x + 12, y + 12), fill=expert_colour(expert))
        draw.text((x + 17, y + 6), f"expert {expert}", fill="black", font=font, anchor="lm")
    return image


def draw_overlays(
    image_HW3: np.ndarray,
    words: Sequence[str],
    regions: Sequence[Sequence[np.ndarray]],
    experts_WL: np.ndarray,
    title: str,
) -> Image.Image:
    """Draw a table of copies of an image: rows are words, columns are blocks, and each copy shows the word's region.

    The region has the colour of the word's expert in that block. Outside of the region the copy is pale. The first column
    has the unchanged image.

    Args:
        image_HW3: the image, uint8.
        words: the W words, one for each row.
        regions: for each word and block, the part of the image that the word attends to, bool [h, w].
        experts_WL: space expert of each word in each of L blocks, int.
        title: text above the figure.
    """
    font, side = ImageFont.load_default(size=11), 64
    base = Image.fromarray(image_HW3).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(base, np.float32)
    left = 10 + max(int(font.getlength(word)) for word in words)
    blocks = experts_WL.shape[1]
    size = (left + side + _GAP + blocks * (side + _GAP), len(words) * (side + _GAP) + 44)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), title, fill="black", font=font)
    for block in range(blocks):
        draw.text((left + (block + 1) * (side + _GAP) + side / 2, 32), str(block), fill="black", font=font, anchor="mm")
    for w, word in enumerate(words):
        top = 42 + w * (side + _GAP)
        draw.text((left - 6, top + side / 2), word, fill="black", font=font, anchor="rm")
        image.paste(base, (left, top))
        for block in range(blocks):
            overlay = _overlay(pixels, regions[w][block], expert_colour(int(experts_WL[w, block])))
            image.paste(Image.fromarray(overlay), (left + (block + 1) * (side + _GAP), top))
    return image


def _overlay(pixels: np.ndarray, region_hw: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    size = (pixels.shape[1], pixels.shape[0])
    mask = np.asarray(Image.fromarray(region_hw.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127
    inside = 0.55 * pixels + 0.45 * np.array(colour, np.float32)
    outside = 0.25 * pixels + 0.75 * 255
    return np.where(mask[..., None], inside, outside).astype(np.uint8)
