"""Fetches shards before their samples are read: those of the current window of the sample order and of the next two.

A window is a group of shards whose samples are shuffled together.
"""

import logging
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import psutil

from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.dataset_index import DatasetIndex
from raphael_dist.errors import UserError

_log = logging.getLogger(__name__)
_THREADS = 4
# With one window ahead, windows of different sizes cost up to 7% of the speed where link and step are about equally fast.
_WINDOWS = 3
_SHARE_OF_CACHE = 0.75  # the rest: the window before, which was used more recently than the next ones
_SHARE_OF_MEMORY = 0.5


class ShardPrefetcher:
    """Fetches shards (tar files of samples) before their samples are read, in background threads.

    Remote shards are downloaded into data.shard_cache. Local shards are read into the page cache. Errors are only logged:
    they are raised later, when a sample of the shard is read. Thread-safe.
    """

    def __init__(self, order: SampleOrder | MixedOrder, first: int = 0) -> None:
        """Create the prefetcher.

        Args:
            order: The order in which samples will be read.
            first: Index of the shard that is fetched first in each window (group of shards that are read together). Pass the
                local rank: the ranks of a node share the fetched shards, so each should begin with a different shard.
        """
        self._order, self._index, self._first = order, order.index, first
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._windows: list[list[int]] = []
        self._current: list[int] = []
        self._futures: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def prefetch_from(self, position: int) -> None:
        """Start to fetch the shards of the current and the next windows, and cancel pending downloads of all other shards.

        A window is a group of shards whose samples are shuffled together. The window after the next one is fetched only if
        data.shard_cache, or the memory, has room for it. `position`: number of the next sample in the endless order of
        training.
        """
        windows = self._order.windows_from(position, _WINDOWS)
        with self._lock:
            if windows == self._windows or self._closed:
                return
            self._windows = windows
            ahead = windows if self._has_room(windows) else windows[:-1]
            self._current = [number for window in ahead for number in window]
            earlier: list[Future[None]] = []
            for window in ahead:
                for number in _rotated(window, self._first):
                    if number not in self._futures:
                        self._futures[number] = self._pool.submit(self._prefetch, number, earlier)
                earlier = [self._futures[number] for number in window]
            for number in [n for n in self._futures if n not in self._current]:
                self._futures.pop(number).cancel()

    def close(self) -> None:
        """Cancel the downloads that have not started, and wait for those that are running."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _has_room(self, windows: list[list[int]]) -> bool:
        """Return whether the remote shards of `windows` fit into data.shard_cache, and the local ones into free memory.

        `windows`: numbers of the shards in each window (group of shards that are read together).
        """
        shards = {number for window in windows for number in window}
        local = self._local(shards)
        num_bytes = int(self._index.num_bytes[list(shards - local)].sum())
        return num_bytes <= _SHARE_OF_CACHE * self._index.store.max_bytes and _fits(self._index, local)

    def _local(self, shards: Iterable[int]) -> set[int]:
        """Return the set of those numbers in `shards` whose shards are local files."""
        return {number for number in shards if not is_remote(self._index.shard(number).source)}

    def _prefetch(self, number: int, earlier: Sequence[Future[None]]) -> None:
        """Wait until all shards of the previous window have been fetched, then fetch a shard.

        A window is a group of shards whose samples are shuffled together. Without the wait, the download of this shard would
        slow down those of the previous window, which is needed earlier. `number`: number of the shard. `earlier`: the
        fetches of the previous window. Waiting for them cannot block forever: they were submitted to the thread pool first.
        """
        wait(earlier)
        shard = self._index.shard(number)
        try:
            if not is_remote(shard.source) and not _fits(self._index, self._local(self._current)):
                return
            path = self._index.store.fetch(shard.source, shard.stamp)
            if not is_remote(shard.source):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)
        except (UserError, OSError) as error:
            _log.debug("shard %s was not prefetched: %s", shard.name, error)


def _rotated(shards: Sequence[int], first: int) -> list[int]:
    start = first % len(shards) if shards else 0
    return [*shards[start:], *shards[:start]]


def _fits(index: DatasetIndex, shards: Collection[int]) -> bool:
    """Return whether the shards with these numbers fit into half of the free memory.

    Otherwise, reading them ahead would evict pages in use from the page cache.
    """
    return int(index.num_bytes[list(shards)].sum()) < _SHARE_OF_MEMORY * psutil.virtual_memory().available
