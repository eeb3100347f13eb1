"""Mixes several sources of samples (data.sources) by weight: computes which source each training position belongs to.

A *run* is `run_length` consecutive positions, whose images have the same size and come from one source. BLOCK consecutive
runs form a block. In each block, the number of runs of a source is proportional to its weight, rounded so that the numbers
add up to BLOCK; their order is random, with the block's number as the seed. So the source of any position, and its position
within the source, are computed without looking at earlier positions. Each source has its own epochs.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

BLOCK = 1024


class MixedOrder:
    """Maps any global position (number of a sample in the endless order of training) to a sample of one of several sources.

    Each group of `run_length` consecutive positions belongs to one source. The class has the interface of `SampleOrder`.
    """

    def __init__(self, parts: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        """Create the mixture.

        Args:
            parts: For each source, the order of its samples. All must have the same index (table of the samples of all
                sources) and the same view (which samples pass the filters).
            weights: For each source, its weight. The number of samples that come from a source is proportional to it.
            seed: Seed of the random order of the sources.

        Raises:
            UserError: A weight is so small that, after rounding, no sample of its source would be used.
        """
        first = parts[0]
        self.index, self.view, self.buckets, self.bucket_of = first.index, first.view, first.buckets, first.bucket_of
        # A source with only one image size has a run length of 1. In the mixture it uses that of the other sources.
        self.run_length = max(part.run_length for part in parts)
        self._parts, self._seed = parts, seed
        self.shares = apportion(weights, BLOCK)
        self._weights = [weight / sum(weights) for weight in weights]
        if min(self.shares) == 0:
            raise UserError(
                f"data.sources: a weight must be at least 1/{2 * BLOCK} of the sum of all weights, but "
                f"{weights[self.shares.index(0)]} is smaller. Raise this weight, or remove its source."
            )
        self._block = lru_cache(maxsize=4)(self._make_block)

    @property
    def samples_per_epoch(self) -> int:
        """Number of positions that count as one epoch of the mixture: the sum of the samples per epoch of all sources.

        The weights decide how often a source is used in an epoch: a source with a large weight may be repeated, and one
        with a small weight may not be used completely.
        """
        return sum(part.samples_per_epoch for part in self._parts)

    @property
    def dropped_per_epoch(self) -> int:
        return sum(part.dropped_per_epoch for part in self._parts)

    @property
    def fingerprint(self) -> str:
        weights = [f"{weight:.9f}" for weight in self._weights]
        first_shards = [str(part.first_shard) for part in self._parts]
        return hashlib.sha256(" ".join([self._parts[0].fingerprint, *weights, *first_shards]).encode()).hexdigest()

    def lookup(self, position: int) -> SamplePosition:
        """Return the sample at a global position (see the class). Raises ValueError if the position is negative."""
        source, source_position = self._find(position)
        return self._parts[source].lookup(source_position)

    def windows_from(self, position: int, count: int) -> list[list[int]]:
        """Return the numbers of the shards that are read next, as `count` lists.

        List 0 has the shards in the current windows of all sources, list 1 those in the windows after these, and so on. A
        window is a group of shards (tar files) whose samples are shuffled together. `position`: number of the current
        sample in the endless order of training.
        """
        block = position // self.run_length // BLOCK
        firsts = [block * share * self.run_length for share in self.shares]
        of_parts = [part.windows_from(first, count) for part, first in zip(self._parts, firsts, strict=True)]
        return [[shard for window in windows for shard in window] for windows in zip(*of_parts, strict=True)]

    def _find(self, position: int) -> tuple[int, int]:
        """Return (number of the source at a global position, position in that source's own order)."""
        if position < 0:
            raise ValueError(f"sample position {position} is negative")
        run, offset = divmod(position, self.run_length)
        block, place = divmod(run, BLOCK)
        sources, before = self._block(block)
        source = int(sources[place])
        return source, (block * self.shares[source] + int(before[place])) * self.run_length + offset

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each run of a block, its source, and how many earlier runs in the block have the same source.

        A run is `run_length` consecutive positions, and block number `block` has BLOCK runs. Both results are int64 [BLOCK].
        """
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        # `extra` differs from those of SampleOrder, which draws for the same purpose with lower numbers.
        sources = generator(self._seed, Purpose.ORDER, block, extra=1 << 63).permutation(sources)
        before = np.zeros(BLOCK, np.int64)
        for source in range(len(self.shares)):
            is_source = sources == source
            before[is_source] = np.arange(np.count_nonzero(is_source))
        return sources, before


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Divide the integer `total` into one integer per weight, in proportion to the weights (largest remainder method)."""
    exact = np.array(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for number in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[number] += 1
    return [int(share) for share in shares]
