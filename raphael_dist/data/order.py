"""The order of training samples.

The sample at a position of this endless order is a pure function of the index (table of all samples), the seed and the
position. So the progress of a run is one integer, the position.

1. In each epoch the shards are permuted and divided into windows of `window_shards` shards. Training reads one window at a
   time, so that few files are open.
2. The samples of a window are permuted. The samples of each bucket (image size) are divided into runs of `run_length`
   samples.
3. The runs of a window are permuted. Samples that do not fill a run are carried over to the next window.

So an epoch drops fewer than `run_length` samples of each bucket, and all epochs have the same length. The required
memory does not grow with the number of samples: only counts for each shard and the sample ids of a few windows are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raphael_dist.data.shards.dataset_index import DatasetIndex
from raphael_dist.data.shards.view import View, open_view
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator
from raphael_dist.text import counted


@dataclass(frozen=True)
class SamplePosition:
    """The sample at one global position (number of a sample in the endless order of training).

    Attributes:
        epoch: Number of the epoch, from 0.
        sample_id: Number of the sample, counted over all shards (tar files).
        bucket: Number of its image size (bucket) in the list of image sizes.
    """

    epoch: int
    sample_id: int
    bucket: int


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The order of one epoch: S shards, divided into W windows (groups of shards whose samples are shuffled together).

    Attributes:
        shards: int64 [S], shard numbers in this epoch's order.
        counts: int64 [W+1, B], for each window and each of B buckets (image sizes), the number of samples of the bucket in
            all earlier windows. The last row has the totals of the epoch.
        starts: [W+1], position in the epoch at which each window begins; the last number is the length of the epoch.
    """

    shards: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


class SampleOrder:
    """Maps any global position (number of a sample in the endless order of training) to a sample.

    It is a pure function: it has no state except caches. Thread-safe. Samples of one bucket (image size) come in runs:
    groups of `run_length` consecutive positions. So a micro-batch has images of one size.

    Attributes:
        buckets: (height, width) of each bucket in pixels.
        bucket_of: [num_samples], the number of each sample's bucket; -1 if a filter drops the sample.
        run_length: Number of positions in a run; 1 if all samples are in one bucket.
        samples_per_epoch: Number of positions in an epoch.
        dropped_per_epoch: Number of samples that each epoch leaves out, since they do not fill a run.
    """

    def __init__(
        self,
        index: DatasetIndex,
        buckets: Sequence[tuple[int, int]],
        seed: int,
        window_shards: int = 16,
        run_length: int = 1,
        view: View | None = None,
        shards: range | None = None,
    ) -> None:
        """Create the order.

        Args:
            index: The index: a table of all samples of the shards (tar files).
            buckets: (height, width) of each bucket (image size) in pixels.
            seed: Seed of the permutations.
            window_shards: Number of shards whose samples are shuffled together (a window).
            run_length: Number of consecutive samples of the same bucket (a run).
            view: Which samples pass the filters, and their buckets (default: all samples pass).
            shards: Numbers of the shards to use (default: all).

        Raises:
            UserError: There is no bucket, or each bucket has fewer than `run_length` samples.
        """
        assert window_shards >= 1
        assert run_length >= 1
        self.index, self.seed, self.window_shards = index, seed, window_shards
        self.view = open_view(index, buckets) if view is None else view
        self.buckets, self.bucket_of = self.view.buckets, self.view.bucket_of
        self.first_shard, end = (shards.start, shards.stop) if shards else (0, index.num_shards)
        self._counts_SB = self.view.counts[self.first_shard : end]
        totals_B = self._counts_SB.sum(axis=0)
        num_samples = int(totals_B.sum())
        self.run_length = run_length if np.count_nonzero(totals_B) > 1 else 1
        self.samples_per_epoch = int((totals_B // self.run_length).sum()) * self.run_length
        self.dropped_per_epoch = num_samples - self.samples_per_epoch
        if self.samples_per_epoch == 0:
            raise UserError(
                f"image.buckets must contain an image size with at least {run_length} samples, since samples of one size "
                f"are read in groups of {run_length} (data.bucket_run, or train.micro_batch_size in validation), but the "
                f"most frequent size has {totals_B.max()} of {counted(num_samples, 'sample')}. Use fewer sizes or more "
                "data, or lower data.bucket_run and train.micro_batch_size."
            )
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._members = lru_cache(maxsize=32)(self._make_members)
        self._window = lru_cache(maxsize=4)(self._make_window)

    @property
    def fingerprint(self) -> str:
        """Hash of the names of all shards and samples; with data.filters, also a hash of the samples that pass the filters.

        Checkpoints store it. A run that resumes must have the fingerprint that is stored in its checkpoint.
        """
        return f"{self.index.fingerprint} {self.view.digest}" if self.view.dropped else self.index.fingerprint

    def lookup(self, position: int) -> SamplePosition:
        """Return the sample at a global position (see the class). Raises ValueError if the position is negative."""
        epoch, window, offset = self._find(position)
        sample_id = int(self._window(epoch, window)[offset])
        return SamplePosition(epoch, sample_id, int(self.bucket_of[sample_id]))

    def windows_from(self, position: int, count: int) -> list[list[int]]:
        """Return the shard numbers of `count` consecutive windows, a list for each. The first window contains `position`.

        `position`: number of a sample in the endless order of training. A window is a group of shards (tar files) whose
        samples are shuffled together.
        """
        epoch, window, _ = self._find(position)
        windows: list[list[int]] = []
        for _ in range(count):
            if window == len(self._epoch(epoch).starts) - 1:
                epoch, window = epoch + 1, 0
            first = window * self.window_shards
            shards = self._epoch(epoch).shards[first : first + self.window_shards]
            windows.append((self.first_shard + shards).tolist())
            window += 1
        return windows

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, number of the window in the epoch, offset in the window) of a global position, all from 0.

        A window is a group of shards (tar files) whose samples are shuffled together.
        """
        if position < 0:
            raise ValueError(f"sample position {position} is negative")
        epoch, offset = divmod(position, self.samples_per_epoch)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, window, offset - int(starts[window])

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = generator(self.seed, Purpose.ORDER, epoch).permutation(len(self._counts_SB))
        firsts = np.arange(0, len(shards), self.window_shards)
        per_window = np.add.reduceat(self._counts_SB[shards], firsts, axis=0)
        counts = np.concatenate([np.zeros_like(per_window[:1]), per_window.cumsum(axis=0)])
        return _Epoch(shards, counts, (counts // self.run_length).sum(axis=1) * self.run_length)

    def _make_members(self, epoch: int, window: int) -> list[np.ndarray]:
        """Return the ids of the samples in a window, in random order: one array for each bucket (image size).

        `window`: number in the epoch of a window, a group of shards (tar files) whose samples are shuffled together.
        """
        first = window * self.window_shards
        shards = self.first_shard + self._epoch(epoch).shards[first : first + self.window_shards]
        starts = self.index.starts
        ids = np.concatenate([self._ids(int(starts[shard]), int(starts[shard + 1])) for shard in shards])
        ids = generator(self.seed, Purpose.ORDER, epoch, extra=1 + 2 * window).permutation(ids)
        of_ids = self.bucket_of[ids]
        dtype = np.uint32 if self.index.num_samples < 1 << 32 else np.int64  # small, because many windows are cached
        return [ids[of_ids == bucket].astype(dtype) for bucket in range(len(self.buckets))]

    def _ids(self, first: int, end: int) -> np.ndarray:
        return first + np.flatnonzero(self.bucket_of[first:end] >= 0)

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample ids at the positions of a window: the runs that end in this window, in random order.

        A window is a group of shards (tar files) whose samples are shuffled together. A run is a group of `run_length`
        samples of one bucket (image size). The first samples of a run may belong to an earlier window.
        """
        ends_WB = self._epoch(epoch).counts[window : window + 2] // self.run_length * self.run_length
        taken = [self._take(epoch, bucket, first, last) for bucket, (first, last) in enumerate(ends_WB.T.tolist())]
        runs = np.concatenate(taken).reshape(-1, self.run_length)
        return generator(self.seed, Purpose.ORDER, epoch, extra=2 + 2 * window).permutation(runs).reshape(-1)

    def _take(self, epoch: int, bucket: int, first: int, last: int) -> np.ndarray:
        """Return entries `first` to `last` - 1 of the list of all sample ids of a bucket (image size) in an epoch.

        The list has the ids of the epoch's windows (groups of shards) one window after another, as `_make_members` returns
        them.
        """
        if first == last:
            return np.zeros(0, np.int64)
        counts = self._epoch(epoch).counts[:, bucket]
        from_window = int(np.searchsorted(counts, first, side="right")) - 1
        to_window = int(np.searchsorted(counts, last, side="left"))
        parts = [self._members(epoch, window)[bucket] for window in range(from_window, to_window)]
        return np.concatenate(parts)[first - counts[from_window] : last - counts[from_window]]
