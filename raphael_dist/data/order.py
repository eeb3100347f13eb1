"""The order of training samples: a pure function of (index, seed, position), so that progress is one integer.

In every epoch the shards are permuted and taken in windows of `window_shards`, so that only a few files are read at a time.
The samples of a window are permuted, those of one bucket (image size) are cut into runs of `run_length`, and the window's
runs are permuted. Samples that do not fill a run are carried over to the next window. So an epoch drops fewer than
`run_length` samples of each bucket, however small the windows are, and all epochs have the same length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.shards import DatasetIndex
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator


@dataclass(frozen=True)
class SamplePosition:
    """What training reads at one global sample position: the sample, its image size, and in which epoch that is."""

    epoch: int
    sample_id: int
    bucket: int


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Where the windows of one epoch begin.

    shards int64 [S]: shard numbers in this epoch's order; counts [W+1, B]: samples of each bucket in the windows before;
    starts [W+1]: positions of the epoch before each window, and its length.
    """

    shards: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


class SampleOrder:
    """Maps any global sample position to a sample. Holds no state but caches, and may be shared by threads.

    Attributes: `buckets`, (height, width) in pixels; `bucket_of`, int16 [num_samples], the bucket of each sample id;
    `run_length`, consecutive positions that share a bucket (1 where all samples do); `samples_per_epoch`;
    `dropped_per_epoch`.
    """

    def __init__(
        self,
        index: DatasetIndex,
        buckets: Sequence[tuple[int, int]],
        seed: int,
        window_shards: int = 16,
        run_length: int = 1,
    ) -> None:
        """UserError: no bucket, a count below 1, or fewer than `run_length` samples in every bucket."""
        counts = {"number of buckets": len(buckets), "window_shards": window_shards, "run_length": run_length}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"data: {name} is {value}; it must be at least 1")
        self.index, self.seed, self.window_shards = index, seed, window_shards
        self.buckets = tuple((int(height), int(width)) for height, width in buckets)
        per_shard = [nearest_buckets(shard.sizes[:, 0], shard.sizes[:, 1], self.buckets) for shard in index.shards]
        self.bucket_of = np.concatenate(per_shard).astype(np.int16)
        self._counts_SB = np.stack([np.bincount(part, minlength=len(self.buckets)) for part in per_shard])
        totals_B = self._counts_SB.sum(axis=0)
        self.run_length = run_length if np.count_nonzero(totals_B) > 1 else 1
        self.samples_per_epoch = int((totals_B // self.run_length).sum()) * self.run_length
        self.dropped_per_epoch = index.num_samples - self.samples_per_epoch
        if self.samples_per_epoch == 0:
            raise UserError(
                f"data: no bucket holds {run_length} samples (the fullest has {totals_B.max()} of {index.num_samples}) "
                "to share a micro-step; use fewer buckets, more data or a smaller micro-batch"
            )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._members = lru_cache(maxsize=32)(self._make_members)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def lookup(self, position: int) -> SamplePosition:
        """Return what lies at a global sample position (0, 1, 2, ... without end). ValueError: a negative one."""
        if position < 0:
            raise ValueError(f"sample position {position} is negative")
        epoch, offset = divmod(position, self.samples_per_epoch)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        sample_id = int(self._window(epoch, window)[offset - starts[window]])
        return SamplePosition(epoch, sample_id, int(self.bucket_of[sample_id]))

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.index.shards))
        firsts = np.arange(0, len(shards), self.window_shards)
        per_window = np.add.reduceat(self._counts_SB[shards], firsts, axis=0)
        counts = np.concatenate([np.zeros_like(per_window[:1]), per_window.cumsum(axis=0)])
        return _Epoch(shards, counts, (counts // self.run_length).sum(axis=1) * self.run_length)

    def _make_members(self, epoch: int, window: int) -> list[np.ndarray]:
        """Return the window's sample ids of each bucket, in random order."""
        first = window * self.window_shards
        shards, starts = self._epoch(epoch).shards[first : first + self.window_shards], self.index.starts
        ids = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        ids = generator(self.seed, Purpose.ORDER, epoch, extra=1 + 2 * window).permutation(ids)
        of_ids = self.bucket_of[ids]
        return [ids[of_ids == bucket] for bucket in range(len(self.buckets))]

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample ids at the window's positions: the runs that fill up within it, permuted."""
        ends_WB = self._epoch(epoch).counts[window : window + 2] // self.run_length * self.run_length
        taken = [self._take(epoch, bucket, first, last) for bucket, (first, last) in enumerate(ends_WB.T.tolist())]
        runs = np.concatenate(taken).reshape(-1, self.run_length)
        return generator(self.seed, Purpose.ORDER, epoch, extra=2 + 2 * window).permutation(runs).reshape(-1)

    def _take(self, epoch: int, bucket: int, first: int, last: int) -> np.ndarray:
        """Return entries first .. last - 1 of the epoch's list of one bucket's sample ids, which spans all windows."""
        if first == last:
            return np.zeros(0, np.int64)
        counts = self._epoch(epoch).counts[:, bucket]
        from_window = int(np.searchsorted(counts, first, side="right")) - 1
        to_window = int(np.searchsorted(counts, last, side="left"))
        parts = [self._members(epoch, window)[bucket] for window in range(from_window, to_window)]
        return np.concatenate(parts)[first - counts[from_window] : last - counts[from_window]]
