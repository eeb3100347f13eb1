"""Read ahead with threads. Threads are enough: decoders and file reads release Python's global lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Prefetcher(Generic[K, V]):
    """Iterates over `fn(key)` for each key, in order, with up to `depth` calls made ahead by `workers` threads.

    When `fn` raises for a key, iteration gives the values before it, then raises that exception and ends; so it does when
    `keys` raises. The threads stop at the end of iteration, by `close()`, or at the end of a `with` block; no call starts
    later.
    """

    def __init__(self, fn: Callable[[K], V], keys: Iterable[K], depth: int = 4, workers: int = 1) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(f"depth {depth} and workers {workers} must be at least 1")
        self._fn, self._keys, self._depth = fn, iter(keys), depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._ahead: deque[Future[V]] = deque()
        self._end: BaseException | None = None

    def __iter__(self) -> Iterator[V]:
        return self

    def __next__(self) -> V:
        try:
            self._fill()
            if not self._ahead:
                raise self._end or StopIteration
            return self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        while self._end is None and len(self._ahead) < self._depth:
            try:
                key = next(self._keys)
            except Exception as error:  # StopIteration too: both end the keys, once what is ahead was given out
                self._end = error
                return
            self._ahead.append(self._pool.submit(self._fn, key))

    def close(self) -> None:
        """Drop what was read ahead and wait for the calls under way. May be called twice."""
        self._end = StopIteration()
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[K, V]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
