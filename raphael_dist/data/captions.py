"""Reads and cleans captions: the paper's filters (URLs, HTML, e-mail addresses) and repair of wrongly decoded text.

Caption files are not trusted, so malformed text is rejected. `CLEANING_VERSION` is the version of the rules in
`clean_caption`. Checkpoints and cached features store the version, since a change of the rules changes the captions.
"""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ftfy import TextFixerConfig, fix_text

from raphael_dist.text import decode_text, json_type, parse_json

CLEANING_VERSION = 2
MAX_CAPTION_CHARS = 2000
MAX_CAPTIONS = 32
MAX_CAPTION_BYTES = 1 << 20

_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]{0,500}>", re.DOTALL)
_URL = re.compile(r"\b(?:[a-z][a-z0-9+.-]{1,20}://|www\.)\S+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_SPACE = re.compile(r"\s+")
# Repairs wrongly decoded text ("schÃ¶n") and keeps intended characters (curly quotes, ligatures, wide letters).
_REPAIR = TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# Emoji that invisible characters join: a family by joiners, the flag of Scotland by tags.
_EMOJI = "[\u2190-\u2bff\U0001f000-\U0001faff][\ufe0f\U0001f3fb-\U0001f3ff]{0,2}"
_JOINED = re.compile(f"({_EMOJI}(?:\u200d{_EMOJI}){{1,9}}|\U0001f3f4[\U000e0020-\U000e007e]{{1,9}}\U000e007f)")


@dataclass(frozen=True)
class CaptionChoice:
    """Where the captions of a sample come from: the settings data.caption_from and data.caption_weights.

    A sample is a group of files in a tar: an image KEY.jpg, and KEY.json or KEY.txt.

    Attributes:
        source: The file with the captions: "json", "txt", or "auto" (the json if it has captions, else the txt).
        weights: If not empty, used instead of `source`: (name, relative probability) of each text that may be the caption.
            A name is a field of the json, or "txt" for the txt file.
    """

    source: Literal["auto", "json", "txt"] = "auto"
    weights: tuple[tuple[str, float], ...] = ()


def clean_caption(text: str) -> str:
    """Clean a caption: repair wrongly decoded text, remove HTML, URLs, e-mail addresses and control characters.

    Returns:
        One line of at most 2,000 characters; "" if nothing is left.
    """
    text = text[: 4 * MAX_CAPTION_CHARS]  # the searches below would be slow on a very long text
    if not text.isascii():
        text = fix_text(text, _REPAIR)
    # Entities may hide tags ("&lt;b&gt;"), so they are decoded first.
    text = html.unescape(text)
    for pattern in (_TAG, _URL, _EMAIL):
        text = pattern.sub(" ", text)
    # `split` returns text and joined emoji in turn; the emoji keep their invisible characters.
    text = "".join(piece if i % 2 else _visible(piece) for i, piece in enumerate(_JOINED.split(text)))
    return _SPACE.sub(" ", text).strip()[:MAX_CAPTION_CHARS].rstrip()


def _visible(text: str) -> str:
    return "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)


def pick(weights: Sequence[float], draw: np.random.Generator) -> int:
    """Draw a random index into `weights`, with probabilities in proportion to the weights. `draw`: the random generator."""
    if min(weights) == max(weights):
        return int(draw.integers(len(weights)))
    edges = np.cumsum(weights)
    return min(int(np.searchsorted(edges, draw.random() * edges[-1], side="right")), len(weights) - 1)


def read_captions(members: Mapping[str, bytes], choice: CaptionChoice) -> tuple[list[str], list[float]]:
    """Return (cleaned captions of a sample, at least one; relative probability of each).

    Args:
        members: Content of the sample's json and txt files, with the keys "json" and "txt". Either may be missing.
        choice: Which texts in these files are captions, and their weights. The captions in a json field that is a list share
            the weight of the field equally.

    Raises:
        ValueError: There is no caption, or one of the files cannot be read; the message is the reason.
    """
    if not choice.weights:
        captions = read_texts({ext: data for ext, data in members.items() if choice.source in ("auto", ext)})[1]
        return captions, [1.0] * len(captions)
    meta = _json_object(members["json"]) if "json" in members else {}
    captions, weights = list[str](), list[float]()
    reason = f"no caption in {', '.join(name for name, _ in choice.weights)}"
    for name, weight in choice.weights:
        texts, problem = texts_in(_decode(members.get("txt", b"")) if name == "txt" else meta.get(name))
        cleaned = _clean_all(texts[:MAX_CAPTIONS])
        captions += cleaned
        weights += [weight / max(1, len(cleaned))] * len(cleaned)
        reason = problem or reason
    if not captions:
        raise ValueError(reason)
    return captions, weights


def read_texts(members: Mapping[str, bytes]) -> tuple[dict[str, object], list[str]]:
    """Return (fields of a sample's json, or {} if it has no json; cleaned captions of the sample, at least one).

    The captions are the list in the json field `captions`. If this field is missing, the caption is the string in the json
    field `caption`. If both are missing, it is the content of the txt.

    Args:
        members: Content of the sample's json and txt files, with the keys "json" and "txt". Either may be missing.

    Raises:
        ValueError: The sample has no caption; a file is not UTF-8 or larger than 1 MiB; the json is not an object; or its
            captions are not strings.
    """
    meta = _json_object(members["json"]) if "json" in members else {}
    texts, problem = first_texts(meta, ("captions", "caption"))
    captions = _clean_all(texts[:MAX_CAPTIONS]) or _clean_all([_decode(members.get("txt", b""))])
    if not captions:
        raise ValueError(problem or "no caption")
    return meta, captions


def first_texts(fields: Mapping[str, object], names: Iterable[str]) -> tuple[list[str], str]:
    """Return the captions, not cleaned, in the first of the fields `names` that has any.

    Args:
        fields: The fields of a sample's json, or of a table row, by name.
        names: Names of fields that may contain captions, in order of priority.

    Returns:
        (captions, ""), or ([], reason) if no field has a caption. The reason is a text for a message: it states the type of
        the first field with a wrong type, and is "" if no field has a wrong type.
    """
    problems = []
    for name in names:
        texts, problem = texts_in(fields.get(name))
        if texts:
            return texts, ""
        problems += [problem] if problem else []
    return [], next(iter(problems), "")


def texts_in(value: object) -> tuple[list[str], str]:
    """Return (captions in the value of a json field or table cell, ""), or ([], problem) if the value has a wrong type.

    The value may be a string or a list of strings. Null and empty strings are left out, so the captions may be []. Other
    types, such as a dict, are wrong. `problem` is a text for a message.
    """
    values = value if isinstance(value, list) else [value]
    texts = [item for item in values if isinstance(item, str) and item.strip()]
    kind = next((json_type(item) for item in values if item is not None and not isinstance(item, str)), None)
    if texts or kind is None:
        return texts, ""
    return [], f"caption is {kind}, not a string"


def _clean_all(texts: Iterable[str]) -> list[str]:
    return [text for text in map(clean_caption, texts) if text]


def _json_object(data: bytes) -> dict[str, object]:
    text = _decode(data)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError("json cannot be parsed") from error
    except ValueError as error:
        raise ValueError(f"json is {error}") from error
    if not isinstance(value, dict):
        raise ValueError("json is not an object")
    return value


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"the file of the caption has {len(data)} bytes, but at most {MAX_CAPTION_BYTES} are allowed")
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"caption or json is {error}") from None
