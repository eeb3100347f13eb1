"""Scores text that a model renders in images, by comparing what an OCR engine reads with what the prompt requests."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raphael_dist.evaluation.distances import bootstrap, wilson
from raphael_dist.text import quoted_parts

# Captions of emoji that show letters or digits: the group of each pattern is this text. Letters are drawn as capitals.
_EMOJI = (
    re.compile(r"keycap with the number (\d+)"),
    re.compile(r"button with the letters? (\w+)"),
    re.compile(r"\b(cool|free|id|new|ok|sos|vs|ng|cl) button"),
)


def requested_text(prompt: str) -> str | None:
    """Return the text that a prompt asks to render in the image; None if the prompt asks for no text.

    This is all text in double quotes, or for captions of emoji with letters or digits ("ok button") the text on the emoji.
    """
    if quoted := quoted_parts(prompt):
        return " ".join(quoted)
    emoji = next(filter(None, (pattern.search(prompt) for pattern in _EMOJI)), None)
    return emoji[1].upper() if emoji else None


def normalise_text(text: str) -> str:
    """Return `text` in capitals, with single spaces instead of punctuation, for comparison: "Open, now!" -> "OPEN NOW"."""
    return " ".join(re.sub(r"[\W_]", " ", text.upper()).split())


def alphabet_of(texts: Iterable[str], alphabet: str | None = None) -> set[str]:
    """Return the characters that the OCR engine may recognise in images that should show the strings `texts`.

    `alphabet`: the characters that such texts can contain. If it is None and one capital letter occurs, all capitals are
    included, and likewise for small letters and digits. So the text that is read in one image hardly depends on the text in
    the other images.
    """
    used = set().union(*texts)
    if alphabet is not None:
        return used | set(alphabet)
    for group in (string.ascii_uppercase, string.ascii_lowercase, string.digits):
        if used & set(group):
            used |= set(group)
    return used


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the smallest number of insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class TextScore:
    """How well an OCR engine reads the text that images should contain. Case and punctuation are ignored.

    Attributes:
        exact: share of images (0..1) whose text is read without an error.
        cer: character error rate: edits (insertions, deletions, replacements) per requested character.
        exact_low, exact_high: 95% interval of `exact` over images (Wilson).
        cer_low, cer_high: 95% interval of `cer` over images (bootstrap).
    """

    exact: float
    exact_low: float
    exact_high: float
    cer: float
    cer_low: float
    cer_high: float


def score_texts(requested: Sequence[str], read: Sequence[str]) -> TextScore:
    """Compare what an OCR engine has read in images with the requested text, ignoring case and punctuation.

    `requested`: for each image, the text that it should show, with at least one letter or digit. `read`: for each image, the
    text that the OCR engine has read.
    """
    pairs = [(normalise_text(a), normalise_text(b)) for a, b in zip(requested, read, strict=True)]
    exact = np.array([a == b for a, b in pairs])
    lengths = np.array([len(a) for a, _ in pairs])
    edits = np.array([edit_distance(a, b) for a, b in pairs])
    cer = float(edits.sum() / lengths.sum())
    return TextScore(float(exact.mean()), *wilson(int(exact.sum()), len(pairs)), cer, *bootstrap(edits / lengths, lengths))
