"""Calls a function ahead of time in threads. Threads suffice, since decoders and file reads release Python's global lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Prefetcher(Generic[K, V]):
    """Iterates over the results of `fn(key)` for each of `keys`, in order. Threads compute results ahead.

    `depth`: largest number of results that are computed ahead. `workers`: number of threads.

    If `fn` or `keys` raises an exception, the iteration first yields the results of all earlier keys, and then raises the
    exception. The threads stop at the end of the iteration, when `close` is called, or at the end of a `with` block.
    """

    def __init__(self, fn: Callable[[K], V], keys: Iterable[K], depth: int = 4, workers: int = 1) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(f"depth {depth} and workers {workers} must be at least 1")
        self._fn, self._keys, self._depth = fn, iter(keys), depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._futures: deque[Future[V]] = deque()
        self._end: BaseException | None = None

    def __iter__(self) -> Iterator[V]:
        return self

    def __next__(self) -> V:
        try:
            self._fill()
            if not self._futures:
                raise self._end or StopIteration
            return self._futures.popleft().result()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        while self._end is None and len(self._futures) < self._depth:
            try:
                key = next(self._keys)
            except Exception as error:  # also StopIteration; it is raised after the results of the keys before
                self._end = error
                return
            self._futures.append(self._pool.submit(self._fn, key))

    def close(self) -> None:
        """Stop the threads: discard results that were computed ahead, and wait for running calls. May be called twice."""
        self._end = StopIteration()
        self._futures.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[K, V]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
