"""Draws text on an image, and describes the image in captions."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raphael_dist.errors import UserError

HEIGHT, WIDTH = 32, 128
MARGIN = 4
# Smallest and largest height of capital letters, in pixels.
CAP_HEIGHTS = (14, 17)
# With --simple: height of capital letters, and distance between the middles of two characters, in pixels.
SIMPLE_CAP_HEIGHT, SIMPLE_ADVANCE = 13, 16
CAPTIONS = 4


@dataclass(frozen=True)
class Font:
    """A font that comes with a PyPI package.

    Attributes:
        name: name of the font in captions.
        style: style of the font in captions, such as "serif".
        module: Python module of the package.
        file: name of the font file in the package.
        licence: licence of the font.
    """

    name: str
    style: str
    module: str
    file: str
    licence: str


FONTS = (
    Font("roboto", "sans", "font_roboto", "Roboto-Bold.ttf", "Apache-2.0"),
    Font("source serif", "serif", "font_source_serif_pro", "SourceSerifPro-Bold.ttf", "OFL-1.1"),
    Font("caladea", "serif", "font_caladea", "Caladea-Bold.ttf", "Apache-2.0"),
    Font("fredoka", "rounded", "font_fredoka_one", "FredokaOne-Regular.ttf", "OFL-1.1"),
)
HELD_OUT_FONT = Font("manrope", "sans", "font_manrope", "Manrope-Bold.ttf", "OFL-1.1")
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (214, 32, 32),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 40),
    "green": (30, 140, 60),
    "blue": (35, 80, 210),
    "purple": (125, 45, 165),
}
# Smallest difference of luminance between text and background.
CONTRAST = 70
PLACES = ("centre", "left", "right")
_PLACE_WEIGHTS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Look:
    """How text is drawn on an image.

    Attributes:
        font: the font.
        colour: name of the text's colour.
        background: name of the background's colour.
        place: position of the text: "centre", "left" or "right".
        cap_height: height of capitals in pixels.
        shift: by how many pixels the text is moved from this position: (down, right).
        advance: distance in pixels between the middles of neighbouring characters; 0: the font's own spacing.
    """

    font: Font
    colour: str
    background: str
    place: str
    cap_height: int
    shift: tuple[int, int]
    advance: int = 0

    @classmethod
    def draw(
        cls,
        random: np.random.Generator,
        fonts: tuple[Font, ...] = FONTS,
        simple: bool = False,
        monochrome: bool = False,
    ) -> "Look":
        """Choose at random how to draw a text: font, colours with enough contrast to be read, position and size.

        Args:
            random: source of random numbers.
            fonts: fonts to choose from.
            simple: always use the first font, one size, the centre, and the same distance between all characters.
            monochrome: use black on white.
        """
        while True:
            colour, background = (str(random.choice(list(COLOURS))) for _ in range(2))
            if abs(_luminance(colour) - _luminance(background)) >= CONTRAST:
                break
        if monochrome:
            colour, background = "black", "white"
        if simple:
            return cls(fonts[0], colour, background, PLACES[0], SIMPLE_CAP_HEIGHT, (0, 0), SIMPLE_ADVANCE)
        return cls(
            font=fonts[random.integers(len(fonts))],
            colour=colour,
            background=background,
            place=str(random.choice(PLACES, p=_PLACE_WEIGHTS)),
            cap_height=int(random.integers(CAP_HEIGHTS[0], CAP_HEIGHTS[1] + 1)),
            shift=(int(random.integers(-1, 2)), int(random.integers(-2, 3))),
        )


def render(text: str, look: Look, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return an RGB image of `height` x `width` pixels that shows `text`. Text that would be too wide is drawn smaller."""
    image = Image.new("RGB", (width, height), COLOURS[look.background])
    pen = ImageDraw.Draw(image)
    if look.advance:
        _draw_evenly(pen, text, look, image.size)
        return image
    for cap_height in range(look.cap_height, 4, -1):
        font = _sized(look.font, cap_height)
        left, _, right, _ = font.getbbox(text, anchor="ls")
        if right - left <= width - 2 * MARGIN:
            break
    free = width - (right - left)
    x = {"centre": free // 2, "left": MARGIN, "right": free - MARGIN}[look.place] + look.shift[1]
    x = min(max(x, 1), max(1, free - 1))
    y = (height + cap_height) // 2 + look.shift[0]
    pen.text((x - left, y), text, COLOURS[look.colour], font, anchor="ls")
    return image


def _draw_evenly(pen: ImageDraw.ImageDraw, text: str, look: Look, size: tuple[int, int]) -> None:
    """Draw `text` in the centre, with `look.advance` pixels between the middles of neighbouring characters.

    `size`: width and height of the image.
    """
    width, height = size
    font, y = _sized(look.font, look.cap_height), (height + look.cap_height) // 2 + look.shift[0]
    start = (width - look.advance * len(text)) / 2 + look.shift[1]
    for i, character in enumerate(text):
        left, _, right, _ = font.getbbox(character, anchor="ls")
        x = start + look.advance * (i + 0.5) - (left + right) / 2
        pen.text((round(x), y), character, COLOURS[look.colour], font, anchor="ls")


def captions(text: str, look: Look, random: np.random.Generator) -> list[str]:
    """Return four captions (CAPTIONS) of an image that shows `text`.

    The first states the text, the colours, the font and a position other than the centre. The others leave out random parts
    of this, but never the text.
    """
    return [_caption(text, look, random, keep) for keep in (1.0, *[0.6] * (CAPTIONS - 1))]


def full_caption(text: str, look: Look) -> str:
    """Return the caption that states an image's text, colours and font style, and the text's position unless central."""
    return _caption(text, look, None, 1.0)


def _caption(text: str, look: Look, random: np.random.Generator | None, keep: float) -> str:
    def kept() -> bool:
        return random is None or random.random() < keep

    kind = "words" if " " in text else "word" if text.isalpha() else "text"
    parts = [f'the {kind} "{text}"' if kept() else f'"{text}"']
    parts += [f"in {look.colour}"] if kept() else []
    parts += [f"on {look.background}"] if kept() else []
    by_name = random is not None and random.random() < 0.5
    font = f", {look.font.name if by_name else look.font.style} font" if kept() else ""
    place = f", {look.place}" if kept() and look.place != "centre" else ""
    return " ".join(parts) + font + place


def _luminance(colour: str) -> float:
    return float(np.dot(COLOURS[colour], (0.299, 0.587, 0.114)))


@cache
def _sized(font: Font, cap_height: int) -> Any:
    """Return the font (of PIL) in the size at which an H is `cap_height` pixels high."""
    spec = importlib.util.find_spec(font.module)
    if spec is None or spec.origin is None:
        package = font.module.replace("_", "-")
        raise UserError(f"the font {font.name} requires the package {package}. Run `pip install {package}`.")
    path = Path(spec.origin).parent / "files" / font.file
    for size in range(cap_height, 4 * cap_height):
        sized = ImageFont.truetype(str(path), size)
        _, top, _, bottom = sized.getbbox("H", anchor="ls")
        if bottom - top >= cap_height:
            return sized
    raise AssertionError(font.file)
