"""Text in images: the text that a prompt requests, its alphabet, and how well an OCR engine reads it."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raphael_dist.evaluation.distances import bootstrap, wilson
from raphael_dist.text import quoted_parts

# Emoji captions that name the text on the image; letters are capitals there.
_EMOJI = (
    re.compile(r"keycap with the number (\d+)"),
    re.compile(r"button with the letters? (\w+)"),
    re.compile(r"\b(cool|free|id|new|ok|sos|vs|ng|cl) button"),
)


def requested_text(prompt: str) -> str | None:
    """Return the text that a prompt requests: all in double quotes, or on an emoji of letters or digits."""
    if quoted := quoted_parts(prompt):
        return " ".join(quoted)
    emoji = next(filter(None, (pattern.search(prompt) for pattern in _EMOJI)), None)
    return emoji[1].upper() if emoji else None


def normalise_text(text: str) -> str:
    """Return text as it is compared: letters and digits in capitals, words separated by one space."""
    return " ".join(re.sub(r"[\W_]", " ", text.upper()).split())


def alphabet_of(texts: Iterable[str]) -> set[str]:
    """Return the characters of texts; one capital allows all capitals, and so for small letters and digits.

    Whole groups, so that the score of a text does not depend on how few others are read with it.
    """
    used = set().union(*texts)
    for group in (string.ascii_uppercase, string.ascii_lowercase, string.digits):
        if used & set(group):
            used |= set(group)
    return used


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the least insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class TextScore:
    """How well texts were read, with the ends of 95% intervals over images.

    exact: share read exactly (interval: Wilson). cer: character error rate, edits per requested character (bootstrap).
    """

    exact: float
    exact_low: float
    exact_high: float
    cer: float
    cer_low: float
    cer_high: float


def score_texts(requested: Sequence[str], read: Sequence[str]) -> TextScore:
    """Return the score of texts as read, compared without case and punctuation. No requested text may be empty then."""
    pairs = [(normalise_text(a), normalise_text(b)) for a, b in zip(requested, read, strict=True)]
    exact = np.array([a == b for a, b in pairs])
    lengths = np.array([len(a) for a, _ in pairs])
    edits = np.array([edit_distance(a, b) for a, b in pairs])
    cer = float(edits.sum() / lengths.sum())
    return TextScore(float(exact.mean()), *wilson(int(exact.sum()), len(pairs)), cer, *bootstrap(edits / lengths, lengths))
