"""The text encoder text.encoder=characters. It has no weights, and encodes text in double quotes letter by letter.

Tokens of subword encoders do not show the spelling. Here, each character in double quotes is a token, whose embedding
depends on the character and on its place in the quoted text. So the model can assign each letter its own region of the image
and its own expert: in Space-MoE layers, a gate chooses an expert for each text token. Every other word is one token, whose
embedding is a hash of the word.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CHARACTERS = "characters"
VERSION = 1  # to be raised if tokens or embeddings change: cached features depend on them
BLOCK = 64
WIDTH = 4 * BLOCK  # character, place in the string, word, word with the word before it
ONE_HOT = 16
_PAD, _END = 0, 1
# A token's number has a high bit for its kind, and below it everything that its embedding depends on.
_CHARACTER, _WORD = 1 << 60, 1 << 61
_PLACE_BITS, _HASH_BITS = 12, 28
_PARTS = re.compile(r"""["“](.+?)["”]|(\w+)""")
_PERIODS = (4, 8, 16, 32)


@dataclass(frozen=True)
class _Encoding:
    """The tokens of one caption. It has the attributes of `tokenizers.Encoding` that this package uses."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    overflowing: bool
    n_sequences: int = 1

    @property
    def word_ids(self) -> list[int | None]:
        return [None if token in (_PAD, _END) else i for i, token in enumerate(self.ids)]

    def token_to_chars(self, index: int) -> tuple[int, int]:
        return self.offsets[index]


class CharacterTokenizer:
    """Tokenizes captions: each character in double quotes is a token, and so is each word outside of quotes.

    It has the methods of a transformers tokenizer that the text encoder uses.
    """

    pad_token, pad_token_id, eos_token_id, bos_token_id, unk_token_id = "<pad>", _PAD, _END, None, None
    all_special_tokens, all_special_ids = ("<pad>", "<end>"), (_PAD, _END)

    def num_special_tokens_to_add(self) -> int:
        """Return the number of tokens that are added to each caption: 1, the end-of-text token."""
        return 1

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **_: object,
    ) -> Any:
        """Tokenize one caption or several, and return a BatchEncoding (input_ids, attention_mask, special_tokens_mask).

        Arguments are those of the tokenizers of transformers; further ones are ignored.
        """
        from transformers import BatchEncoding

        limit = max_length if truncation else None
        encodings = [_encode(text, limit, add_special_tokens) for text in ([texts] if isinstance(texts, str) else texts)]
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        length = max_length or longest if padding == "max_length" else longest if padding else 0
        rows: dict[str, Any] = {"input_ids": [], "attention_mask": [], "special_tokens_mask": []}
        for encoding in encodings:
            used, blank = len(encoding.ids), max(0, length - len(encoding.ids))
            rows["input_ids"].append(encoding.ids + [_PAD] * blank)
            rows["attention_mask"].append([1] * used + [0] * blank)
            rows["special_tokens_mask"].append([int(i == _END) for i in encoding.ids] + [1] * blank)
        if isinstance(texts, str):
            rows = {name: row[0] for name, row in rows.items()}
        return BatchEncoding(rows, encoding=encodings, tensor_type=return_tensors)  # type: ignore[arg-type]


class CharacterModel(nn.Module):
    """Computes the embeddings of tokens by fixed formulas (`embed`); it has no weights.

    It has the methods of a transformers text encoder that this package uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, model_type=CHARACTERS, vocab_size=1 << 62)
        self.register_buffer("_device", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device on which results are returned."""
        return torch.device(self.get_buffer("_device").device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a diffusers pipeline reads from a text encoder. `forward` returns float32 in any case."""
        return self.get_buffer("_device").dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Return an object with `last_hidden_state`: the embeddings, float32 [B, Y, WIDTH], of tokens int64 [B, Y].

        `attention_mask` is not used.
        """
        rows = torch.tensor([embed(number) for number in input_ids.flatten().tolist()])
        return SimpleNamespace(last_hidden_state=rows.view(*input_ids.shape, WIDTH).to(self.device))


def fingerprint(max_tokens: int) -> str:
    """Return a SHA-256 (hex) that identifies the outputs of the encoder text.encoder=characters.

    It depends on the encoder's version and on `max_tokens`, the number of tokens of a caption.
    """
    return hashlib.sha256(f"{CHARACTERS} {VERSION} {max_tokens}".encode()).hexdigest()


def _encode(text: str, limit: int | None, add_end: bool) -> _Encoding:
    tokens = list(_tokens(text))
    keep = len(tokens) if limit is None else max(0, limit - add_end)
    end = [(_END, (len(text), len(text)))] if add_end else []
    ids, offsets = zip(*selected, strict=True) if (selected := tokens[:keep] + end) else ((), ())
    return _Encoding(list(ids), list(offsets), len(tokens) > keep)


def _tokens(text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (token id, (first, end) of the token's characters in `text`) for each token except the end-of-text token."""
    before = 0
    for part in _PARTS.finditer(text):
        if quoted := part[1]:
            length = _clamped(len(quoted))
            for i, char in enumerate(quoted):
                start = part.start(1) + i
                yield _CHARACTER | ord(char) << 2 * _PLACE_BITS | _clamped(i) << _PLACE_BITS | length, (start, start + 1)
        else:
            word = int.from_bytes(hashlib.sha256(part[2].casefold().encode()).digest()[:4], "big") >> (32 - _HASH_BITS)
            yield _WORD | before << _HASH_BITS | word, part.span()
            before = word


def _clamped(value: int) -> int:
    return min(value, (1 << _PLACE_BITS) - 1)


@lru_cache(maxsize=1 << 16)
def embed(number: int) -> list[float]:
    """Return the embedding of a token, a list of WIDTH (256) numbers. The embedding of padding is all zeros.

    `number`: the token's id, which `CharacterTokenizer` returns. The bits of the id store everything on which the embedding
    depends: the character and its index in the quoted text, or hashes of the word and of the word before it.
    """
    zeros = [0.0] * BLOCK
    if number & _CHARACTER:
        mask = (1 << _PLACE_BITS) - 1
        place, length = number >> _PLACE_BITS & mask, number & mask
        return [*_signs(f"character {number >> 2 * _PLACE_BITS & 0x1FFFFF}"), *_place(place, length), *zeros, *zeros]
    if number & _WORD:
        mask = (1 << _HASH_BITS) - 1
        word, before = number & mask, number >> _HASH_BITS & mask
        return [*zeros, *zeros, *_signs(f"word {word}"), *_signs(f"words {before} {word}")]
    return [*zeros, *zeros, *(_signs("end") if number == _END else zeros), *zeros]


def _signs(key: str) -> list[float]:
    """Return a vector of BLOCK (64) numbers, 1 or -1, from the SHA-256 of `key`.

    The vectors of two different keys are nearly orthogonal.
    """
    bits = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
    return [1.0 if bits >> i & 1 else -1.0 for i in range(BLOCK)]


def _place(place: int, length: int) -> list[float]:
    """Return BLOCK (64) numbers that encode the index `place` of a character in a text of `length` characters.

    They depend on the character's distances from the start, the end and the middle of the text, and on `place` / `length`.
    """
    after = length - 1 - place
    one_hots = [2.0 * (i == value) for value in (place, after) for i in range(ONE_HOT)]
    angles = [2 * math.pi * value / period for value in (place, after, place - (length - 1) / 2) for period in _PERIODS]
    angles += [math.pi * k * (place + 0.5) / length for k in range(1, len(_PERIODS) + 1)]
    return one_hots + [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
