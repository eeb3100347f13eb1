"""Computes routes from the gates alone, without running the U-Net: the experts of words and of timesteps in each block.

Shape legend: L transformer blocks, T timesteps, W words, Y text tokens, K experts, D text width.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from raphael_dist.data.features.encoders import TextEncoder
from raphael_dist.model.routing import Gate, choose, gate_logits
from raphael_dist.model.unet import RaphaelUNet

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Words = list[tuple[str, int]]  # (word, index of its first text token) for each word of a caption


@torch.no_grad()
def time_routes(model: RaphaelUNet, num_timesteps: int) -> Tensor | None:
    """Return the time expert (chosen by the timestep) of each block for the timesteps 0 .. T-1, int64 [L, T].

    This is t_router(t) of Sec. 7.3. Returns None if the model has no Time-MoE. There are L transformer blocks.

    `num_timesteps`: number of timesteps, T.
    """
    if not model.config.time_experts:
        return None
    weight = next(model.parameters())
    timesteps = torch.arange(num_timesteps, device=weight.device)
    embedding = model.time_embedding(model.time_proj(timesteps).to(weight.dtype))
    return model.route_time(timesteps, embedding, None)[0].cpu()


@torch.no_grad()
def word_routes(model: RaphaelUNet, tokens_BYD: Tensor) -> Tensor | None:
    """Return the space expert that the gate of each block chooses for each text token, int64 [B, L, Y].

    This is route(y_i) of Sec. 3.1. Returns None if the model has no Space-MoE.

    `tokens_BYD`: outputs of the text encoder for B captions with Y text tokens each. There are L transformer blocks.
    """
    if not model.config.space_experts:
        return None
    return choose(_text_logits(model, tokens_BYD), None, "none")[0].transpose(0, 1).cpu()


@torch.no_grad()
def noisy_word_routes(model: RaphaelUNet, tokens_BYD: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Return the space expert of each text token in each block, int64 [B, L, Y], chosen with the gate noise of training.

    `tokens_BYD`: outputs of the text encoder for B captions with Y text tokens each. `deviation`: standard deviation of the
    Gaussian noise on the gate logits. `seed`: seed of the noise. The model must have a Space-MoE with L transformer blocks.
    """
    logits = _text_logits(model, tokens_BYD).cpu()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return choose(logits, deviation * noise, "none")[0].transpose(0, 1)


def _text_logits(model: RaphaelUNet, tokens_BYD: Tensor) -> Tensor:
    weight = next(model.parameters())
    return gate_logits(cast(Sequence[Gate], model.text_gates), tokens_BYD.to(weight.device, weight.dtype))


def split_words(tokenizer: "PreTrainedTokenizerBase", caption: str, max_tokens: int) -> Words:
    """Divide a caption into words, and find the first text token of each. Punctuation is left out.

    `tokenizer`: the tokenizer of the text encoder. `max_tokens`: number of tokens that the text encoder reads; words beyond
    these tokens are left out.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_tokens)
    fast = getattr(encoded, "is_fast", True)
    tokens = _tokens_by_word(encoded, caption) if fast else _tokens_by_prefix(tokenizer, encoded, caption)
    return [(text.lower(), first) for first, text in tokens if any(char.isalnum() for char in text)]


def _tokens_by_word(encoded: "BatchEncoding", caption: str) -> Iterator[tuple[int, str]]:
    numbers = encoded.word_ids()
    for word in dict.fromkeys(n for n in numbers if n is not None):
        places = [i for i, n in enumerate(numbers) if n == word]
        begin, end = encoded.token_to_chars(places[0]), encoded.token_to_chars(places[-1])
        assert begin is not None
        assert end is not None
        yield places[0], caption[begin.start : end.end].strip()


def _tokens_by_prefix(
    tokenizer: "PreTrainedTokenizerBase", encoded: "BatchEncoding", caption: str
) -> Iterator[tuple[int, str]]:
    """Yield (index of the first token, word) for each word of `caption`.

    This is for tokenizers that do not map tokens to characters, such as that of ByT5. The caption is tokenized twice for
    each word, up to the word's beginning and up to its end. The numbers of tokens are the indices.

    `encoded`: the tokenized caption, which may be truncated. Words in the part that was cut off are left out.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    empty = tokenizer("")["input_ids"]
    before = len(empty) - 1 if len(empty) > 1 else 0  # number of special tokens before the text; one is after it
    for match in re.finditer(r"\S+", caption):
        first, last = (before + count(caption[:end]) for end in match.span())
        if last <= len(encoded["input_ids"]):
            yield first, match[0]


def collect_word_paths(
    model: RaphaelUNet, text: TextEncoder, captions: Sequence[str], batch: int = 64
) -> list[tuple[str, int, list[int]]]:
    """Return (word, number of its caption, path) for each word of each caption. The model must have a Space-MoE.

    A path is the list of the space experts in all blocks for the first token of the word. Captions are numbered from 0;
    captions that differ only in spaces and capitals have the same number.

    `text`: the text encoder. `batch`: number of captions encoded at a time.
    """
    paths = []
    numbers: dict[str, int] = {}
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        routes_BLY = word_routes(model, text.encode(part, pad=False).tokens)
        assert routes_BLY is not None
        for caption, route_LY in zip(part, routes_BLY, strict=True):
            number = numbers.setdefault(" ".join(caption.casefold().split()), len(numbers))
            words = split_words(text.tokenizer, caption, text.max_tokens)
            paths += [(word, number, route_LY[:, first].tolist()) for word, first in words]
    return paths
