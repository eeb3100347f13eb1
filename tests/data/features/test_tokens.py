"""Tokenization: special tokens written in captions are plain text, and truncation is reported."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertTokenizer, ByT5Tokenizer, CLIPTokenizer, T5Tokenizer

from raphael_dist.data.features.encoders import TextEncoder
from raphael_dist.data.features.tokens import tokenize
from raphael_dist.data_prep.inspect_data import truncated_captions

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip() -> Any:
    """A byte-pair tokenizer like CLIP's, with the special tokens of its text models."""
    symbols = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def t5() -> Any:
    """A Unigram tokenizer like T5's, which has the special tokens among its pieces."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(piece, -5.0) for piece in f"▁{LETTERS}<>/_0123456789[]|."] + [(f"<extra_id_{n}>", 0.0) for n in range(3)]
    return T5Tokenizer(vocab=pieces, extra_ids=3)


def bert() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"[]<>|/", *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "CLIP": (clip, "a <|endoftext|>b <|ENDOFTEXT|><|startoftext|> c"),
    "T5": (t5, "a </s> b<pad>c <extra_id_1> </</s>s> "),
    "BERT": (bert, "a [SEP] b[MASK] [CLS] [PAD][sep] c"),
    "ByT5": (ByT5Tokenizer, "a </s> b<pad> <extra_id_5>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_written_in_caption_is_plain_text(kind: str) -> None:
    make, caption = KINDS[kind]
    tokenizer = make()
    batch, cut = tokenize(tokenizer, [caption, "a b c"], 99, "max_length")
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} if kind != "CLIP" else set())
    for row, text in enumerate([caption, "a b c"]):
        attended = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        added = tokenizer.build_inputs_with_special_tokens([]) if kind == "ByT5" else tokenizer("")["input_ids"]
        assert sum(number in special for number in attended) == len(added), f"those that are always added, in {text!r}"
    assert cut == 0
    plain = tokenizer(["a b c"], padding="max_length", truncation=True, max_length=99, return_tensors="pt")
    assert torch.equal(batch["input_ids"][1], plain["input_ids"][0])
    assert "special_tokens_mask" not in batch


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_captions_are_counted(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    full = len(tokenizer("a b c d")["input_ids"])
    texts = ["a b c d", "a b c d e f g", "a", "a b c d e"]
    assert tokenize(tokenizer, texts, full, "max_length")[1] == 2
    assert tokenize(tokenizer, texts, full, "longest")[0]["input_ids"].shape == (4, full)


def test_padding_character_in_caption_is_ordinary() -> None:
    tokenizer, same = clip(), clip()
    tokenizer.pad_token = "!"  # as Stable Diffusion 2 has it
    batch, _ = tokenize(tokenizer, ["!?a wow!"], 9, "max_length")
    plain, _ = tokenize(same, ["!?a wow!"], 9, "max_length")
    assert batch["input_ids"][batch["attention_mask"].bool()].equal(plain["input_ids"][plain["attention_mask"].bool()])


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder.load("minilm", 8, "cpu", torch.float32)


def test_truncation_is_logged_once_with_count(minilm: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red heart above a green house beside the blue sea"
    with caplog.at_level(logging.WARNING, logger="raphael_dist"):
        minilm.counter.warn()
        assert caplog.messages == []
        minilm.encode([long, "a dog"])
        minilm.encode(["a cat"])
        for _ in range(2):
            minilm.counter.warn()
            minilm.warn_truncated([long, long, "a dog"], "prompts")
    assert caplog.messages == [
        "text.max_tokens=8: longer captions are truncated (1 of 3)",
        "text.max_tokens=8: longer prompts are truncated (2 of 3)",
    ]
    line = "text.max_tokens=8: longer captions are truncated (1 of 2)"
    assert truncated_captions([long, "a dog"], "minilm", 8) == line
    assert "were not counted: text.encoder='nowhere' must be" in truncated_captions([long], "nowhere", 8)


def test_caption_end_is_the_token_added_by_the_tokenizer(minilm: TextEncoder) -> None:
    written, plain = minilm.encode(["a [SEP] b"]), minilm.encode(["a"])
    assert written.end.item() > plain.end.item() + 1
