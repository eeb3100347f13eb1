"""Text in pictures: what an OCR engine reads, beside what the prompt asked for."""

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from raphael_dist.errors import UserError

# A picture, uint8 [H, W, 3], to the text in it.
Reader = Callable[[np.ndarray], str]
_QUOTED = re.compile(r"""["“](.+?)["”]""")
# The emoji whose captions say what is written on them.
_EMOJI = (
    (re.compile(r"keycap with the number (\d+)"), str),
    (re.compile(r"button with the letters? (\w+)"), str.upper),
    (re.compile(r"\b(cool|free|id|new|ok|sos|vs|ng|cl) button"), str.upper),
)
SIDE = 400  # pixels that a small picture is enlarged to: engines are made for scans


def asked_text(prompt: str) -> str | None:
    """Return the text that a prompt asks for: what stands in double quotes, or on an emoji of letters or digits."""
    if found := _QUOTED.search(prompt):
        return found[1]
    for pattern, spell in _EMOJI:
        if found := pattern.search(prompt):
            return str(spell(found[1]))
    return None


def normalised(text: str) -> str:
    """Return a text as it is compared: its letters and digits in capitals, words apart by single blanks."""
    return " ".join(re.sub(r"[\W_]", " ", text.upper()).split())


def edit_distance(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and replacements that make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def reader_of(spec: str) -> Reader:
    """Return the engine that an option names: "tesseract", or "module:function" with a function of a picture's pixels.

    UserError: it is not installed, or there is no such function.
    """
    if spec == "tesseract":
        if shutil.which("tesseract") is None:
            raise UserError("--ocr tesseract: not installed; Debian: tesseract-ocr; or give --ocr module:function")
        return tesseract
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--ocr: given {spec!r}, allowed tesseract or module:function ({error})") from None
    if not callable(found):
        raise UserError(f"--ocr: {spec} is not a function of a picture")
    return lambda pixels: str(found(pixels))


def tesseract(pixels_HW3: np.ndarray) -> str:
    """Return what tesseract reads as one line, or where that is nothing as one character; light on dark as well as dark on
    light, the reading of more letters and digits."""
    image = Image.fromarray(pixels_HW3).convert("L")
    scale = max(1, SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    both = (image, Image.fromarray(255 - np.asarray(image)))
    for mode in ("7", "10"):  # tesseract's for a line, and for a character
        best = max((_read(one, mode) for one in both), key=lambda text: len(normalised(text)))
        if normalised(best):
            return best
    return ""


def _read(image: Image.Image, mode: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        image.save(path)
        command = ["tesseract", str(path), "stdout", "--psm", mode, "--dpi", "300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"--ocr tesseract: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return done.stdout.strip()
