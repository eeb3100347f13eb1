"""Several sources with weights: which source a position draws from, exact and without a state.

Runs of positions (`run_length` of one image size) are dealt to the sources in blocks: each block of BLOCK runs has of every
source its share of the weights, rounded so that they add up, in an order that the block's number fixes. So the n-th run of a
source is known at any position without looking at the ones before, and shares are exact after every block. Each source goes
through its own epochs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

BLOCK = 1024


@dataclass(frozen=True, eq=False)
class _Dealt:
    """source [BLOCK]: of each run of a block; before [BLOCK]: how many runs of the same source come before it there."""

    source: np.ndarray
    before: np.ndarray


class MixedOrder:
    """Maps any global sample position to a sample of one of the sources; otherwise as `SampleOrder`."""

    def __init__(self, parts: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        """`parts`: the sources' orders, over one index and view. UserError: a weight too small to be dealt a run."""
        self.index, self.view, self.buckets, self.bucket_of = (
            parts[0].index,
            parts[0].view,
            parts[0].buckets,
            parts[0].bucket_of,
        )
        # Where a source has one image size only, its runs are as long as the others'.
        self.run_length = max(part.run_length for part in parts)
        self._parts, self._seed = parts, seed
        self.shares = apportion(weights, BLOCK)
        self._weights = [weight / sum(weights) for weight in weights]
        if min(self.shares) == 0:
            least = list(weights)[self.shares.index(0)]
            raise UserError(
                f"data.sources: the weight {least} is under 1/{2 * BLOCK} of all; raise it, or leave the source out"
            )
        self._block = lru_cache(maxsize=4)(self._deal)

    @property
    def samples_per_epoch(self) -> int:
        """As many positions as all sources have samples; a source of greater weight has begun anew by then."""
        return sum(part.samples_per_epoch for part in self._parts)

    @property
    def dropped_per_epoch(self) -> int:
        return sum(part.dropped_per_epoch for part in self._parts)

    @property
    def fingerprint(self) -> str:
        parts = [
            self._parts[0].fingerprint,
            *(f"{weight:.9f}" for weight in self._weights),
            *(p.first_shard for p in self._parts),
        ]
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    def lookup(self, position: int) -> SamplePosition:
        """Return what lies at a global sample position. ValueError: a negative one."""
        source, own = self._find(position)
        return self._parts[source].lookup(own)

    def shards_from(self, position: int, windows: int = 2) -> list[int]:
        """Return the numbers of the shards that the windows of all sources at a position read first."""
        block = position // self.run_length // BLOCK
        firsts = [block * share * self.run_length for share in self.shares]
        return [n for part, first in zip(self._parts, firsts, strict=True) for n in part.shards_from(first, windows)]

    def _find(self, position: int) -> tuple[int, int]:
        """Return (source, position in that source's own order)."""
        if position < 0:
            raise ValueError(f"sample position {position} is negative")
        run, offset = divmod(position, self.run_length)
        block, place = divmod(run, BLOCK)
        dealt = self._block(block)
        source = int(dealt.source[place])
        return source, (block * self.shares[source] + int(dealt.before[place])) * self.run_length + offset

    def _deal(self, block: int) -> _Dealt:
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        # Apart from what the orders draw of the same purpose: they use lower numbers.
        sources = generator(self._seed, Purpose.ORDER, block, extra=1 << 63).permutation(sources)
        before = np.zeros(BLOCK, np.int64)
        for source in range(len(self.shares)):
            mine = sources == source
            before[mine] = np.arange(np.count_nonzero(mine))
        return _Dealt(sources, before)


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to `weights` that add up to `total` (largest remainders)."""
    exact = np.array(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for number in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[number] += 1
    return [int(share) for share in shares]
