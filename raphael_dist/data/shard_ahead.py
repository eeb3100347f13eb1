"""Brings the shards of the window being read, and of the next, to this machine before their samples are wanted."""

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

from raphael_dist.data.index import DatasetIndex
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.remote import is_remote
from raphael_dist.errors import UserError

_log = logging.getLogger(__name__)
_THREADS = 4
_SHARE_OF_MEMORY = 0.5


class ShardAhead:
    """Fetches remote shards into the store's folder, and has the system read local ones from front to back into its memory.

    Ranks of a node share both; each begins with other shards, so that they fetch different ones. An error is left to whoever
    reads the shard. Safe to call from several threads.
    """

    def __init__(self, order: SampleOrder | MixedOrder, first: int = 0) -> None:
        """`first`: with which shard of a window to begin, the rank's number on its node."""
        self._order, self._index, self._first = order, order.index, first
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._wanted: list[int] = []
        self._under_way: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def at(self, position: int) -> None:
        """Begin to bring what is read from a position on, if that is not under way."""
        shards = self._order.shards_from(position)
        with self._lock:
            if shards == self._wanted or self._closed:
                return
            self._wanted = shards
            half = len(shards) // 2
            for number in (*_turned(shards[:half], self._first), *_turned(shards[half:], self._first)):
                if number not in self._under_way:
                    self._under_way[number] = self._pool.submit(self._bring, number)
            for number in [n for n in self._under_way if n not in shards]:
                self._under_way.pop(number).cancel()

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _bring(self, number: int) -> None:
        shard = self._index.shards[number]
        try:
            if not is_remote(shard.source) and not _fits(self._index, self._wanted):
                return
            path = self._index.store.bring(shard.source, shard.stamp)
            if not is_remote(shard.source):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)
        except (UserError, OSError) as error:
            _log.debug("shard %s was not brought ahead: %s", shard.name, error)


def _turned(shards: Sequence[int], first: int) -> list[int]:
    place = first % len(shards) if shards else 0
    return [*shards[place:], *shards[:place]]


def _fits(index: DatasetIndex, shards: Sequence[int]) -> bool:
    """Return whether the windows fit into the memory that is free: else reading ahead would push out what is needed now."""
    return int(index.num_bytes[list(shards)].sum()) < _SHARE_OF_MEMORY * psutil.virtual_memory().available
