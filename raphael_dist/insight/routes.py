"""Diffusion paths from the gates alone: of words through the space experts, of timesteps through the time experts.

Shape legend: L transformer blocks, T timesteps, W words, Y text tokens, K experts, D text width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from raphael_dist.data.encoders import TextEncoder
from raphael_dist.model.routing import choose, gate_logits
from raphael_dist.model.unet import RaphaelUNet


@dataclass(frozen=True, eq=False)
class Words:
    """The words of one caption: their texts, and the text tokens [first, last) of each."""

    texts: list[str]
    spans: list[tuple[int, int]]


@torch.no_grad()
def time_routes(model: RaphaelUNet, num_timesteps: int) -> Tensor | None:
    """Return t_router(t) (Sec. 7.3) of every block and timestep 0 .. T-1, int64 [L, T]; None without a Time-MoE."""
    if not model.config.time_experts:
        return None
    weight = next(model.parameters())
    timesteps = torch.arange(num_timesteps, device=weight.device)
    embedding = model.time_embedding(model.time_proj(timesteps).to(weight.dtype))
    return model.route_time(timesteps, embedding, None)[0].cpu()


@torch.no_grad()
def word_routes(model: RaphaelUNet, tokens_BYD: Tensor) -> Tensor | None:
    """Return route(y_i) (Sec. 3.1) of every block and text token, int64 [B, L, Y]; None without a Space-MoE."""
    if not model.config.space_experts:
        return None
    weight = next(model.parameters())
    return _route(model.text_gates, tokens_BYD.to(weight.device, weight.dtype)).transpose(0, 1).cpu()


@torch.no_grad()
def noisy_word_routes(model: RaphaelUNet, tokens_BYD: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """As `word_routes`, with noise of that deviation on the gates' logits, as in training."""
    weight = next(model.parameters())
    logits = gate_logits(cast(Any, model.text_gates), tokens_BYD.to(weight.device, weight.dtype)).cpu()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return choose(logits, deviation * noise, "none")[0].transpose(0, 1)


def _route(gates: Any, x: Tensor) -> Tensor:
    return choose(gate_logits(gates, x), None, "none")[0]


def words_of(tokenizer: Any, caption: str, max_tokens: int) -> Words:
    """Return the words of a caption as the tokenizer splits it; cut off where the encoder cuts it off.

    A word is what lies between blanks, without punctuation.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_tokens)
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    for first, last in _tokens_by_word(encoded):
        begin, end = encoded.token_to_chars(first).start, encoded.token_to_chars(last - 1).end
        text = caption[begin:end].strip()
        if any(char.isalnum() for char in text):
            texts.append(text.lower())
            spans.append((first, last))
    return Words(texts, spans)


def _tokens_by_word(encoded: Any) -> Iterator[tuple[int, int]]:
    numbers = encoded.word_ids()
    for word in dict.fromkeys(n for n in numbers if n is not None):
        places = [i for i, n in enumerate(numbers) if n == word]
        yield places[0], places[-1] + 1


def paths_of_words(
    model: RaphaelUNet, text: TextEncoder, captions: Sequence[str], batch: int = 64
) -> list[tuple[str, int, list[int]]]:
    """Return (word, number of its caption, path) for each word of each caption; a path has one space expert per block.

    A word of several tokens has the path of the first.
    """
    found = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        routes_BLY = word_routes(model, text.encode(part, pad=False).tokens)
        assert routes_BLY is not None
        for number, (caption, route_LY) in enumerate(zip(part, routes_BLY, strict=True), start=start):
            words = words_of(text.tokenizer, caption, text.max_tokens)
            found += [
                (word, number, route_LY[:, first].tolist())
                for word, (first, _) in zip(words.texts, words.spans, strict=True)
            ]
    return found
