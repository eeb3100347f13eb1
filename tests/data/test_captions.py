"""Caption cleaning: repair of wrongly decoded text, kept characters, bounded time."""
# ruff: noqa: RUF001

import json
import time
from collections.abc import Callable

import pytest

from raphael_dist.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    CaptionChoice,
    clean_caption,
    read_captions,
    read_texts,
)

FAMILY, SCOTLAND = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
)
BROKEN = {
    "schÃ¶n": "schön",
    "lâ€™Ã©tÃ© Ã\xa0 Paris": "l’été à Paris",
    "Ð¿Ñ€Ð¸Ð²ÐµÑ‚": "привет",
    "ðŸ˜€ smile": "😀 smile",
    "ÃƒÂ¼ber": "über",  # twice
    "a \ud83d\ude00 pair": "a 😀 pair",  # surrogates, as a json may hold them
}
MEANT = [
    "schön", "“quoted” ‘so’", "ﬁne ligatures", "ｗｉｄｅ", "東京タワー", "नमस्ते", "café vs. cafe", "x² ≤ 3 µm", "São Paulo",
    "ÃRVORE", FAMILY, f"a {FAMILY} at home", SCOTLAND, "❤️ and 👍🏽", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f9d1\U0001f3fd\u200d\U0001f680",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_wrongly_decoded_text_is_repaired(text: str) -> None:
    assert clean_caption(text) == BROKEN[text]


@pytest.mark.parametrize("text", MEANT)
def test_intended_characters_and_joined_emoji_are_kept(text: str) -> None:
    assert clean_caption(text) == text


def test_cleaning_is_idempotent() -> None:
    for text in (*BROKEN, *MEANT):
        once = clean_caption(text)
        assert clean_caption(once) == once


def test_single_joiner_or_tag_is_removed() -> None:
    assert clean_caption("a\u200db") == "a b"
    assert clean_caption("\u200d\u200d \U0001f468\u200d") == "\U0001f468"
    assert clean_caption("flag\U000e0067\U000e007f") == "flag"
    assert clean_caption("\u202eright to left\u202c\ufeff") == "right to left"


MEGABYTE = MAX_CAPTION_BYTES // 4
HOSTILE: dict[str, Callable[[], str]] = {
    "combining marks": lambda: "a" + "\u0301" * (2 * MEGABYTE - 100),
    "stacked marks of every kind": lambda: "".join(chr(0x300 + n % 0x70) for n in range(2 * MEGABYTE - 100)),
    "joiners": lambda: "\u200d" * MEGABYTE,
    "a family without end": lambda: (FAMILY + "\u200d") * (MEGABYTE // 8),
    "tags without an end": lambda: "\U0001f3f4" + "\U000e0061" * (MEGABYTE - 100),
    "mended again and again": lambda: "Ã" * (MEGABYTE * 2 - 100),
    "nearly mended": lambda: "ÃƒÂ" * (MEGABYTE // 2),
    "open tags": lambda: "<a" * (MEGABYTE * 2 - 100),
    "open comments": lambda: "<!--" * (MEGABYTE - 100),
    "addresses": lambda: "a@" + "a." * MEGABYTE,
    "an address without an end": lambda: "a" * (4 * MEGABYTE - 100),
    "schemes": lambda: "a." * (2 * MEGABYTE - 100),
    "entities": lambda: "&amp;" * (MEGABYTE // 2),
    "nested entities": lambda: "&" + "amp;" * (MEGABYTE // 2),
    "surrogates": lambda: "\ud83d" * 10_000,
    "spaces": lambda: " " * (4 * MEGABYTE - 100),
    "controls": lambda: "\x1b[" * (2 * MEGABYTE - 100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_of_a_megabyte_is_cleaned_in_bounded_time(name: str) -> None:
    text = HOSTILE[name]()
    began = time.process_time()
    cleaned = clean_caption(text)
    assert time.process_time() - began < 0.5
    assert len(cleaned) <= MAX_CAPTION_CHARS
    cleaned.encode("utf-8", "strict")


def test_hostile_captions_take_bounded_time_and_size() -> None:
    many = json.dumps({"captions": ["Ã\u0301" * 1500 for _ in range(50)]}).encode()
    began = time.process_time()
    assert len(read_texts({"json": many})[1]) == MAX_CAPTIONS
    assert time.process_time() - began < 5
    with pytest.raises(ValueError, match="at most 1048576 are allowed"):
        read_texts({"txt": b"x" * (MAX_CAPTION_BYTES + 1)})


WRONG = [
    ({"en": "a dog"}, "an object"),
    (float("nan"), "a number"),
    (7, "a number"),
    (True, "true or false"),
    ([["a"]], "a list"),
]


@pytest.mark.parametrize(("value", "kind"), WRONG)
def test_caption_of_another_type_is_reported_and_replaced_by_next_text(value: object, kind: str) -> None:
    for field in ("caption", "captions"):
        meta = json.dumps({field: value}).encode()
        with pytest.raises(ValueError, match=f"^caption is {kind}, not a string$"):
            read_texts({"json": meta})
        with pytest.raises(ValueError, match=f"^caption is {kind}, not a string$"):
            read_captions({"json": meta}, CaptionChoice(weights=((field, 1.0),)))
        assert read_texts({"json": meta, "txt": b"a cat"})[1] == ["a cat"]
    assert read_texts({"json": json.dumps({"captions": value, "caption": "a cat"}).encode()})[1] == ["a cat"]


def test_missing_caption_in_a_list_keeps_the_others() -> None:
    meta = json.dumps({"captions": ["a", None]}).encode()
    assert read_texts({"json": meta, "txt": b"b"})[1] == ["a"]
    assert read_texts({"json": b'{"captions": [null]}', "txt": b"b"})[1] == ["b"]
    assert read_captions({"json": meta}, CaptionChoice(weights=(("captions", 1.0),))) == (["a"], [1.0])


def test_captions_are_utf8_with_optional_byte_order_mark() -> None:
    mark = b"\xef\xbb\xbf"
    assert read_texts({"json": mark + b'{"caption": "a dog"}'})[1] == ["a dog"]
    assert read_texts({"txt": mark + b"a dog"})[1] == ["a dog"]
    for data in ("größe".encode("latin-1"), "größe".encode("utf-16")):
        with pytest.raises(ValueError, match="caption or json is not UTF-8"):
            read_texts({"txt": data})
