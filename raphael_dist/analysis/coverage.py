"""Measures how much of the image the regions of text tokens cover, and how much space experts compute (paper, Sec. 3.1).

The region of a text token is the set of image tokens whose attention to it is at least alpha times the largest one. A space
expert processes the union of the regions of all text tokens that are routed to it. Its computation is measured as the share
of all (image token, space expert) pairs that are processed. Most of the 77 text tokens are padding and have regions, too, so
many pairs can be processed although regions are small. In training, gate noise distributes text tokens over more experts
than in sampling.

Shape legend: L transformer blocks, N image tokens, Y text tokens, K experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from raphael_dist.analysis.recorder import Record
from raphael_dist.model.routing import region_mask_BNY, space_weights_BYK

ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9)


@dataclass(frozen=True)
class Coverage:
    """How much of the image the regions of text tokens cover, and how much space experts compute, for one threshold alpha.

    The region of a text token is the set of image tokens whose attention to it is at least alpha times the largest one. A
    space expert computes the regions of the text tokens that are routed to it. Each list has one share (0..1) per
    transformer block.

    Attributes:
        alpha: the threshold.
        words: mean share of the image tokens in the region of a text token that is not padding.
        padding: mean share of the image tokens in the region of a padding token.
        pairs: share of all (image token, space expert) pairs that are computed in sampling.
        pairs_of_words: the same share if padding tokens are left out (`model.mask_padding`).
        trained: as `pairs`, but in training, where noise is added to the gates.
        trained_of_words: as `pairs_of_words`, but in training.
    """

    alpha: float
    words: list[float]
    padding: list[float]
    pairs: list[float]
    pairs_of_words: list[float]
    trained: list[float]
    trained_of_words: list[float]

    def means(self) -> list[float]:
        """Return means over the blocks of `words`, `padding`, `pairs`, `pairs_of_words`, `trained`, `trained_of_words`."""
        columns = (self.words, self.padding, self.pairs, self.pairs_of_words, self.trained, self.trained_of_words)
        return [fmean(column) for column in columns]


def measure_coverage(
    record: Record, noisy_LY: Tensor, mask_Y: Tensor, num_experts: int, alphas: Sequence[float] = ALPHAS
) -> list[Coverage]:
    """Measure, for each threshold alpha, how much of the image the regions of text tokens cover.

    The region of a text token is the set of image tokens whose attention to it is at least alpha times the largest one.

    Args:
        record: a recorded forward pass of a model with Space-MoE, with attention maps and without gate noise.
        noisy_LY: space expert of each text token in each block with the gate noise of training, int64 [L, Y] for L
            transformer blocks and Y text tokens.
        mask_Y: bool [Y], False at padding tokens, which are measured separately.
        num_experts: number of space experts of a block.
        alphas: the thresholds.

    Returns:
        A `Coverage` for each threshold, in the order of `alphas`.
    """
    assert record.space_LY is not None
    coverages = []
    for alpha in alphas:
        rows: list[tuple[float, ...]] = []
        for map_NY, route_Y, noisy_Y in zip(record.maps, record.space_LY, noisy_LY, strict=True):
            region_NY = region_mask_BNY(map_NY[None], alpha)[0]
            share_Y = region_NY.mean(dim=0)
            padding = float(share_Y[~mask_Y].mean()) if not mask_Y.all() else float("nan")
            pairs = [
                _pair_share(region_NY, route, num_experts, tokens)
                for route in (route_Y, noisy_Y)
                for tokens in (None, mask_Y[None])
            ]
            rows.append((float(share_Y[mask_Y].mean()), padding, *pairs))
        coverages.append(Coverage(alpha, *(list(column) for column in zip(*rows, strict=True))))
    return coverages


def _pair_share(region_NY: Tensor, route_Y: Tensor, num_experts: int, mask_BY: Tensor | None) -> float:
    weight_YK = space_weights_BYK(route_Y[None], torch.ones(1, len(route_Y)), num_experts, mask_BY)[0]
    return float((region_NY @ weight_YK > 0).float().mean())


def route_agreement(record: Record, noisy_LY: Tensor, mask_Y: Tensor) -> float:
    """Return the share (0..1) of (word token, block) pairs whose space expert is the same with and without gate noise.

    Args:
        record: a recorded forward pass without gate noise, with the space expert of each text token.
        noisy_LY: space expert of each of Y text tokens in each of L blocks with gate noise, int64.
        mask_Y: bool [Y], False at padding tokens, which are left out.
    """
    assert record.space_LY is not None
    return float((noisy_LY == record.space_LY)[:, mask_Y].float().mean())
