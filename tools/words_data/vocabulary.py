"""Chooses the words and random strings of training images, and those held out. No training text contains a held-out text."""

import hashlib
import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from webdataset import WebDataset

from raphael_dist.errors import UserError

MAX_LETTERS = 8
# Without 0 and 1, which many fonts draw as O and I.
ALPHABET = string.ascii_uppercase + "23456789"
HELD_OUT_SHARE = 0.28
# A held-out word has this many letters or more: nearly every string contains some word of two or three letters.
MIN_HELD_OUT = 4
HELD_OUT_STRINGS = 300
_STRINGS_SEED = 28


def emoji_words(folder: Path) -> list[str]:
    """Return the words of 2 to 8 letters in the names of all emoji, in capital letters and sorted.

    `folder`: folder of the emoji shards. Raises UserError if it has no shards.
    """
    shards = [str(path) for path in sorted(folder.glob("*-*.tar*"))]
    if not shards:
        raise UserError(
            f"--emoji={folder} requires train-*.tar.gz and val-*.tar.gz, but has no shards. Use --emoji data/emoji."
        )
    words: set[str] = set()
    for sample in WebDataset(shards, shardshuffle=False, empty_check=False):
        words.update(re.findall(r"[a-z]+", json.loads(sample["json"])["concept"]))
    return sorted(word.upper() for word in words if 2 <= len(word) <= MAX_LETTERS)


def random_string(random: np.random.Generator, shortest: int = 1, longest: int = MAX_LETTERS) -> str:
    """Draw a random string of `shortest` to `longest` characters of ALPHABET."""
    length = int(random.integers(shortest, longest + 1))
    return "".join(ALPHABET[i] for i in random.integers(len(ALPHABET), size=length))


class Vocabulary:
    """The words and strings for training images, and those that are held out for evaluation.

    Whether a word is held out depends on its sha256. No training word contains a held-out word: BIRDS is not used if BIRD is
    held out.
    """

    def __init__(self, words: Iterable[str]) -> None:
        words = sorted(set(words))
        self.held_out_words = [word for word in words if _is_held_out(word)]
        random = np.random.default_rng(_STRINGS_SEED)
        strings: dict[str, None] = {}
        while len(strings) < HELD_OUT_STRINGS:
            text = random_string(random, MIN_HELD_OUT)
            if text not in words:
                strings[text] = None
        self.held_out_strings = list(strings)
        self._held_out = re.compile("|".join([*self.held_out_words, *self.held_out_strings]))
        self.words = [word for word in words if self.allowed(word)]

    def allowed(self, text: str) -> bool:
        """Return whether a training image may show `text`: it has no held-out word or string, even without its spaces."""
        return not (self._held_out.search(text) or self._held_out.search(text.replace(" ", "")))

    def training_text(self, random: np.random.Generator, longest: int | None = None) -> str:
        """Draw a text for a training image: a word (half of the time), a random string, or two or three words.

        `longest`: draw only single words and strings with at most this number of characters; None: no limit.
        """
        words = self.words if longest is None else [word for word in self.words if len(word) <= longest]
        while True:
            kind = random.random()
            if words and kind < 0.5:
                text = _choice(words, random)
            elif kind < 0.9 or longest is not None:
                text = random_string(random, longest=longest or MAX_LETTERS)
            else:
                text = " ".join(_choice(words, random) for _ in range(random.integers(2, 4)))
            if len(text) <= MAX_LETTERS + 4 and self.allowed(text):
                return text


def _choice(words: list[str], random: np.random.Generator) -> str:
    return words[random.integers(len(words))]


def _is_held_out(word: str) -> bool:
    draw = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return len(word) >= MIN_HELD_OUT and draw < HELD_OUT_SHARE * 2**32
