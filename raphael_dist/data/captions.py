"""Captions as training text: the paper's filters (URLs, HTML, e-mail addresses); untrusted bytes read strictly."""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
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


def read_texts(members: Mapping[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """Return what the json of a sample holds ({} without one), and its captions, cleaned: at least one.

    Captions are the json's list `captions`, or else its string `caption`; where these are empty, the txt is one caption.
    `members` maps "json" and "txt", if the sample has them, to their bytes. ValueError with a short reason: no caption, not
    UTF-8, over 1 MiB, json that is no object, captions that are not strings.
    """
    meta = _json_object(members["json"]) if "json" in members else {}
    given = meta.get("captions") or meta.get("caption") or []
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError("json captions are not a list of strings")
    captions = _cleaned(given[:MAX_CAPTIONS]) or _cleaned([_decode(members.get("txt", b""))])
    if not captions:
        raise ValueError("no caption")
    return meta, captions


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
