"""Finds an installed font that can draw a text in any script. Characters that the font lacks are escaped."""

import itertools
import os
import re
import sys
from functools import cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_NO_LETTER = "\U0010ffff"  # no font has a glyph for it
_MAX_FONTS = 300
_NOT_PLAIN = re.compile("bold|italic|oblique|mono|light|thin|condensed|display|serif|math|lastresort", re.IGNORECASE)


def drawable(text: str, size: int) -> tuple[str, Font]:
    """Return (`text` as one line, the font to draw it with).

    The font is Pillow's default font if that has all characters of the text, otherwise the font that lacks the fewest.
    A character that the font lacks is escaped in the line, for example as \\u65e5. `size`: height of the font in pixels.
    """
    text = " ".join(text.split())
    letters = frozenset(text) - {" "}
    best: Path | None = None
    missing = {char for char in letters if not _has(None, size, char)}
    for path in _font_files() if missing else ():
        lacks = {char for char in letters if not _has(path, size, char)}
        if len(lacks) < len(missing) and not any(char.isascii() for char in lacks):
            best, missing = path, lacks
    escaped = "".join(char.encode("unicode_escape").decode() if char in missing else char for char in text)
    return escaped, _load(best, size) or ImageFont.load_default(size)


@cache
def _has(path: Path | None, size: int, char: str) -> bool:
    font = _load(path, size)
    return font is not None and _glyph(font, char) != _glyph(font, _NO_LETTER)


def _glyph(font: Font, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


@cache
def _load(path: Path | None, size: int) -> Font | None:
    try:
        return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)
    except OSError:  # not a font, or a bitmap font of another size
        return None


@cache
def _font_files() -> tuple[Path, ...]:
    """Return the paths of the upright sans-serif fonts of regular weight that are installed or come with matplotlib."""
    home = Path("~").expanduser()
    folders = [home / ".fonts", home / ".local/share/fonts", home / "Library/Fonts"]
    folders += map(Path, ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts", "/Library/Fonts"))
    files = (Path(where) / name for folder in folders for where, _, names in os.walk(folder) for name in names)
    fonts = (file for file in files if file.suffix.lower() in (".ttf", ".otf", ".ttc") and not _NOT_PLAIN.search(file.name))
    paths = list(itertools.islice(fonts, _MAX_FONTS))
    paths += [path for entry in sys.path for path in Path(entry, "matplotlib/mpl-data/fonts/ttf").glob("DejaVuSans.ttf")]
    return tuple(sorted(paths, key=lambda path: path.name))
