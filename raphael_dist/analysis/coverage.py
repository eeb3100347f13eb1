"""How much of the image the regions of Sec. 3.1 cover, by alpha, and how many (image token, expert) pairs they use.

The region of a text token is where its attention is at least alpha of its maximum. An expert processes the union of the
regions of all tokens routed to it. Most of the 77 tokens are padding, so that many pairs can be used although regions are
small. In training, gate noise distributes tokens over more experts than the trained gates choose.
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
    """Shares at one alpha, a value for each block.

    Attributes:
        words, padding: share of the image in the region of a word, of a padding token.
        pairs, pairs_of_words: share of (image token, expert) pairs used in sampling, with and without padding tokens
            (model.mask_padding).
        trained, trained_of_words: the same with the gate noise of training.
    """

    alpha: float
    words: list[float]
    padding: list[float]
    pairs: list[float]
    pairs_of_words: list[float]
    trained: list[float]
    trained_of_words: list[float]

    def means(self) -> list[float]:
        """Return the means over blocks, in the order of the attributes."""
        columns = (self.words, self.padding, self.pairs, self.pairs_of_words, self.trained, self.trained_of_words)
        return [fmean(column) for column in columns]


def measure_coverage(
    record: Record, noisy_LY: Tensor, mask_Y: Tensor, num_experts: int, alphas: Sequence[float] = ALPHAS
) -> list[Coverage]:
    """Return the coverage at each alpha.

    Args:
        record: recorded forward passes of a Space-MoE, with attention maps.
        noisy_LY: routes with the gate noise of training, int64.
        mask_Y: False at padding tokens.
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
    """Return the share of (word, block) pairs that select the same expert with and without the gate noise of training."""
    assert record.space_LY is not None
    return float((noisy_LY == record.space_LY)[:, mask_Y].float().mean())
