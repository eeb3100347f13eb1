"""How much of the picture the regions of Sec. 3.1 cover, by alpha, and how many (image token, expert) pairs they need.

A region is where a text token's attention is at least alpha of its largest. An expert works on the union of the regions of
all tokens that are routed to it, and padding tokens are most of the 77: so pairs may fill up though regions are small. In
training the gates' noise spreads the tokens over more experts than the trained gates choose.
Shape legend: L transformer blocks, N image tokens, Y text tokens, K experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.insight.recorder import Record
from raphael_dist.model.routing import region_mask_BNY, space_weights_BYK

ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9)


@dataclass(frozen=True)
class Coverage:
    """Of one alpha, by block: the share of the picture in the region of a word and of a padding token; the share of (image
    token, expert) pairs in use with padding tokens and without (model.mask_padding), in sampling and, with noise, in
    training."""

    alpha: float
    words: list[float]
    padding: list[float]
    pairs: list[float]
    pairs_of_words: list[float]
    trained: list[float]
    trained_of_words: list[float]


def coverage(
    record: Record, noisy_LY: Tensor, mask_Y: Tensor, num_experts: int, alphas: Sequence[float] = ALPHAS
) -> list[Coverage]:
    """Return the coverage at each alpha, from a record with maps.

    noisy_LY: the routes with the noise of training, int64. mask_Y: False at padding tokens.
    """
    assert record.space_LY is not None
    found = []
    for alpha in alphas:
        rows: list[tuple[float, ...]] = []
        for map_NY, route_Y, noisy_Y in zip(record.maps, record.space_LY, noisy_LY, strict=True):
            region_NY = region_mask_BNY(map_NY[None], alpha)[0]
            share_Y = region_NY.mean(dim=0)
            padding = float(share_Y[~mask_Y].mean()) if not mask_Y.all() else float("nan")
            pairs = [
                _pairs(region_NY, r, num_experts, taking) for r in (route_Y, noisy_Y) for taking in (None, mask_Y[None])
            ]
            rows.append((float(share_Y[mask_Y].mean()), padding, *pairs))
        found.append(Coverage(alpha, *(list(column) for column in zip(*rows, strict=True))))
    return found


def _pairs(region_NY: Tensor, route_Y: Tensor, num_experts: int, taking_part: Tensor | None) -> float:
    weight_YK = space_weights_BYK(route_Y[None], torch.ones(1, len(route_Y)), num_experts, taking_part)[0]
    return float((region_NY @ weight_YK > 0).float().mean())


def agreement(record: Record, noisy_LY: Tensor, mask_Y: Tensor) -> float:
    """Return the share of the words' routes, over all blocks, that the noise of training leaves as they are."""
    assert record.space_LY is not None
    return float((noisy_LY == record.space_LY)[:, mask_Y].float().mean())
