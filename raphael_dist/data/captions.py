"""Captions as training text: the paper's filters (URLs, HTML, e-mail addresses), text that was decoded wrongly mended.

Untrusted bytes are read strictly. `CLEANING_VERSION` stands for all that `clean_caption` does: other rules are other data,
and checkpoints and cached features note it.
"""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ftfy import TextFixerConfig, fix_text

CLEANING_VERSION = 2  # 1: without ftfy; joined emoji were taken apart
MAX_CAPTION_CHARS = 2000
MAX_CAPTIONS = 32
MAX_CAPTION_BYTES = 1 << 20

_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]{0,500}>", re.DOTALL)
_URL = re.compile(r"\b(?:[a-z][a-z0-9+.-]{1,20}://|www\.)\S+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_SPACE = re.compile(r"\s+")
# What is broken is mended ("schÃ¶n"); what was meant (curly quotes, ligatures, wide letters) stays.
_MEND = TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# Emoji that invisible characters hold together: a family by joiners, the flag of Scotland by tags.
_PICTURE = "[\u2190-\u2bff\U0001f000-\U0001faff][\ufe0f\U0001f3fb-\U0001f3ff]{0,2}"
_JOINED = re.compile(f"({_PICTURE}(?:\u200d{_PICTURE}){{1,9}}|\U0001f3f4[\U000e0020-\U000e007e]{{1,9}}\U000e007f)")


@dataclass(frozen=True)
class CaptionChoice:
    """Which texts of a sample are its captions.

    source: `json` or `txt` alone, or `auto`: the json's where it has any, else the txt. weights: (name, weight) pairs
    instead, a name being a field of the json, or `txt`; a sample's weights are those of the names that it has.
    """

    source: Literal["auto", "json", "txt"] = "auto"
    weights: tuple[tuple[str, float], ...] = ()


def clean_caption(text: str) -> str:
    """Return `text` mended, without HTML, URLs, e-mail addresses and control characters, on one line, length capped.

    The cap (2,000 characters) is applied before the patterns too, so that no text makes them slow. May return "".
    """
    text = text[: 4 * MAX_CAPTION_CHARS]
    if not text.isascii():
        text = fix_text(text, _MEND)
    # Entities may hide tags ("&lt;b&gt;"), so they are decoded first.
    text = html.unescape(text)
    for pattern in (_TAG, _URL, _EMAIL):
        text = pattern.sub(" ", text)
    # Every second piece is a match of the pattern's group.
    text = "".join(piece if i % 2 else _visible(piece) for i, piece in enumerate(_JOINED.split(text)))
    return _SPACE.sub(" ", text).strip()[:MAX_CAPTION_CHARS].rstrip()


def _visible(text: str) -> str:
    return "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)


def pick(weights: Sequence[float], draw: np.random.Generator) -> int:
    """Return the number of one of `weights`, drawn in proportion to them."""
    if min(weights) == max(weights):
        return int(draw.integers(len(weights)))
    edges = np.cumsum(weights)
    return min(int(np.searchsorted(edges, draw.random() * edges[-1], side="right")), len(weights) - 1)


def read_captions(members: Mapping[str, bytes], choice: CaptionChoice) -> tuple[list[str], list[float]]:
    """Return a sample's captions, cleaned, at least one, and how likely each is to be drawn (any scale).

    A field that holds a list shares its weight among its captions. Otherwise as `read_texts`.
    """
    if not choice.weights:
        captions = read_texts({ext: data for ext, data in members.items() if choice.source in ("auto", ext)})[1]
        return captions, [1.0] * len(captions)
    meta = _json_object(members["json"]) if "json" in members else {}
    captions, weights = list[str](), list[float]()
    for name, weight in choice.weights:
        given = _decode(members.get("txt", b"")) if name == "txt" else meta.get(name) or []
        found = _cleaned(_strings(given)[:MAX_CAPTIONS])
        captions += found
        weights += [weight / max(1, len(found))] * len(found)
    if not captions:
        raise ValueError(f"no caption in {', '.join(name for name, _ in choice.weights)}")
    return captions, weights


def read_texts(members: Mapping[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """Return what the json of a sample holds ({} without one), and its captions, cleaned: at least one.

    Captions are the json's list `captions`, or else its string `caption`; where these are empty, the txt is one caption.
    `members` maps "json" and "txt", if the sample has them, to their bytes. ValueError with a short reason: no caption, not
    UTF-8, over 1 MiB, json that is no object, captions that are not strings.
    """
    meta = _json_object(members["json"]) if "json" in members else {}
    given = _strings(meta.get("captions") or meta.get("caption") or [])
    captions = _cleaned(given[:MAX_CAPTIONS]) or _cleaned([_decode(members.get("txt", b""))])
    if not captions:
        raise ValueError("no caption")
    return meta, captions


def _strings(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError("json captions are not a list of strings")
    return given


def _cleaned(texts: Iterable[str]) -> list[str]:
    return [text for text in map(clean_caption, texts) if text]


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_decode(data))
    except RecursionError as error:
        raise ValueError("json is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError("json cannot be parsed") from error
    if not isinstance(value, dict):
        raise ValueError("json is not an object")
    return value


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"caption or json of {len(data)} bytes, at most {MAX_CAPTION_BYTES} allowed")
    try:
        return data.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption or json is not UTF-8 (byte {error.start})") from error
