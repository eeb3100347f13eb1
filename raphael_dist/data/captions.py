"""Captions as training text: the paper's filters (URLs, HTML, e-mail addresses); untrusted bytes read strictly."""

import html
import json
import re
import unicodedata
from typing import Any

MAX_CAPTION_CHARS = 2000
MAX_CAPTIONS = 32
MAX_CAPTION_BYTES = 1 << 20

_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]{0,500}>", re.DOTALL)
_URL = re.compile(r"\b(?:[a-z][a-z0-9+.-]{1,20}://|www\.)\S+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_SPACE = re.compile(r"\s+")


def clean_caption(text: str) -> str:
    """Return `text` without HTML, URLs, e-mail addresses and control characters, on one line, length capped.

    The cap (2,000 characters) is applied before the patterns too, so that no text makes them slow. May return "".
    """
    # Entities may hide tags ("&lt;b&gt;"), so they are decoded first.
    text = html.unescape(text[: 4 * MAX_CAPTION_CHARS])
    for pattern in (_TAG, _URL, _EMAIL):
        text = pattern.sub(" ", text)
    text = "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)
    return _SPACE.sub(" ", text).strip()[:MAX_CAPTION_CHARS].rstrip()


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`; ValueError with a short reason if it is anything else."""
    try:
        value = json.loads(_decode(data))
    except RecursionError as error:
        raise ValueError("json is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError("json cannot be parsed") from error
    if not isinstance(value, dict):
        raise ValueError("json is not an object")
    return value


def captions_of(meta: dict[str, Any]) -> list[str]:
    """Return the clean, non-empty captions of a sample's json: its list `captions`, else its string `caption`."""
    found = meta.get("captions") or meta.get("caption") or []
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError("json captions are not a list of strings")
    return [text for text in map(clean_caption, found[:MAX_CAPTIONS]) if text]


def read_captions(data: bytes, ext: str | None = None) -> list[str]:
    """Return the clean, non-empty captions in a sample's json or txt member.

    `ext` is "json" or "txt"; without it, text that opens with a brace is json. A txt is one caption.
    ValueError with a short reason: not UTF-8, over 1 MiB, not a JSON object, captions that are not strings.
    """
    if ext == "json" or (ext is None and data.lstrip()[:1] == b"{"):
        return captions_of(parse_json_object(data))
    text = clean_caption(_decode(data))
    return [text] if text else []


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"caption or json of {len(data)} bytes, at most {MAX_CAPTION_BYTES} allowed")
    try:
        return data.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption or json is not UTF-8 (byte {error.start})") from error
