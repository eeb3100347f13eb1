"""Runs work of unknown length on one rank or on all, without a collective that could time out.

If a rank waited in a collective while another rank reads a million files, the collective would time out. With this module, a
rank that has finished polls the process group's key-value store until all ranks have finished. Ranks that still work report
their progress there. If no rank has reported for SILENCE_S seconds, all waiting ranks raise HungError, which names the
unfinished ranks. If one rank fails, the other ranks stop at their next report, and all raise its error.

Cost: the more ranks there are, the less often each polls. The store gets about 2,000 requests a second from waiting ranks,
and a few more for each report.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from raphael_dist.errors import HungError
from raphael_dist.runtime.clock import RunningClock
from raphael_dist.runtime.progress_bar import ProgressBar, Reporter
from raphael_dist.runtime.ranks import TIMEOUT, host_name, raise_if_any_failed
from raphael_dist.runtime.rendezvous import ANSWER_S, MAX_NAMED, POLL_S_PER_RANK

_log = logging.getLogger(__name__)
T = TypeVar("T")
SILENCE_S = TIMEOUT.total_seconds()  # as long as a collective would wait
LOG_EVERY_S = 60.0
_pieces = [0]  # number of uses of `long_work` so far, which names the next one: all ranks use it in the same order
listeners: list[Callable[[], None]] = []  # called at every report of any rank


class AbandonedError(RuntimeError):
    """Raised inside this rank's work to end it, because another rank has failed and the result is no longer needed."""


@contextmanager
def long_work(doing: str) -> Iterator[Reporter]:
    """Return a context manager in which every rank does work of any length.

    Ranks that finish first do not wait in a collective, which could time out. If the work fails on one rank, all ranks raise
    an error. The work must not call collectives, and must report at least every 30 minutes (SILENCE_S). The end of the
    context is collective.

    Args:
        doing: what is done, for progress bars and messages, e.g. "indexing".

    Yields:
        The function that the work calls to report this rank's progress.

    Raises:
        HungError: no rank has reported for SILENCE_S seconds.
        UserError, NotSavedError, RuntimeError: as in `ranks.raise_on_all_ranks`.
    """
    watch, failure = Watch(doing, SILENCE_S), None
    with ProgressBar(doing, enabled=dist.get_rank() == 0) as bar:

        def report(text: str, done: int | None = None, total: int | None = None) -> None:
            bar.report(text, done, total)
            watch.report(text)

        try:
            yield report
        except Exception as error:
            failure = error
    watch.finish(failed=failure is not None)
    watch.wait()
    raise_if_any_failed(None, None if isinstance(failure, AbandonedError) else failure)


def run_on_all_ranks(doing: str, work: Callable[[Reporter], T]) -> T:
    """Run work of any length on every rank, and return this rank's result. If `work` fails on one rank, all raise an error.

    All ranks must call this function. Unlike in a collective, waiting for a slow rank does not time out while it reports.

    Args:
        doing: what is done, for progress bars and messages, e.g. "indexing".
        work: the work. It gets a function with which it reports its progress, at least every 30 minutes.
    """
    with long_work(doing) as report:
        return work(report)


def run_on_rank0(doing: str, work: Callable[[Reporter], T]) -> T:
    """Run work of any length on rank 0 only, and return its result on all ranks. If `work` fails, all ranks raise an error.

    All ranks must call this function. Unlike in a collective, waiting for rank 0 does not time out while it reports.

    Args:
        doing: what is done, for progress bars and messages, e.g. "looking for checkpoints".
        work: the work. It gets a function with which it reports its progress, at least every 30 minutes. Its result is
            pickled.
    """
    result: list[T | None] = [None]
    with long_work(doing) as report:
        if dist.get_rank() == 0:
            result = [work(report)]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


def report_failure(reason: str) -> None:
    """Report to the other ranks that this rank has failed and will not take part in the next `long_work` (shared work).

    The other ranks then do not wait for this rank at the end of that work, but raise a HungError with the message `reason`.
    """

    def post() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, or there is none yet
            store = _store_of(_pieces[0])
            store.set("left", reason)
            store.add("signs", 1)

    thread = threading.Thread(target=post, daemon=True)  # the store may be in a process that hangs
    thread.start()
    thread.join(ANSWER_S)


def _store_of(piece: int) -> dist.Store:
    return dist.PrefixStore(f"long work {piece}", dist.distributed_c10d._get_default_store())


class Watch:
    """Publishes this rank's progress in one piece of work that all ranks do (`long_work`), and follows that of other ranks.

    Ranks exchange their progress through the process group's key-value store. A separate thread makes all requests to this
    store, because the process that keeps it (that of rank 0, usually) may hang, and requests have no timeout.
    """

    def __init__(self, doing: str, silence_s: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._doing, self._silence = doing, silence_s
        self._store = _store_of(_pieces[0])
        _pieces[0] += 1
        self._status, self._reports = doing, 1
        self._finished = self._failed = self._abandoned = False
        self._last_status = "nothing"  # the newest of any rank
        self._problem: str | None = None
        # Polled every few seconds, so that longer gaps are suspensions of this process.
        self._clock = RunningClock(max(2 * self._pause(silence_s), 10.0))
        self._answered = self._clock.now()  # when the store answered last
        self._changed, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name=doing, daemon=True).start()

    def report(self, text: str) -> None:
        """Publish this rank's progress. Raises AbandonedError if another rank has failed. `text`: e.g. "file 3 of 10"."""
        self._status, self._reports = f"{self._doing}: {text}", self._reports + 1
        if self._abandoned:
            raise AbandonedError

    def finish(self, failed: bool) -> None:
        """Publish that this rank has finished its work. `failed`: whether the work failed with an error."""
        self._failed, self._finished = failed, True
        self._changed.set()

    def wait(self) -> None:
        """Wait until all ranks have finished.

        Raises HungError if no rank reports any more, or if the store through which ranks report does not answer.
        """
        self._answered = self._clock.now()  # the work may have kept the thread from running
        while not self._over.wait(min(1.0, self._silence / 8)):
            if self._clock.now() - self._answered > self._silence:
                raise HungError(
                    f"{self._doing}: the store through which ranks exchange their status (usually in the process of rank 0) "
                    f"has not answered for {self._silence:g} s. The last report was: {self._last_status}"
                )
        if self._problem is not None:
            if self._rank == 0:  # the store may end with this process: let the others read it first
                time.sleep(3 * self._pause(self._silence))
            raise HungError(f"{self._doing}: {self._problem}")

    def _run(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # the process that keeps the store is gone
            self._problem = (
                "the connection to the store through which ranks exchange their status was lost "
                f"({' '.join(str(error).split())[:200]}). The last report was: {self._last_status}"
            )
        self._over.set()

    def _exchange(self) -> None:
        """Publish the status of this rank and read that of the other ranks, again and again.

        Returns when all ranks have finished, a rank has called `report_failure`, or no rank has reported for too long.
        """
        began = last_sign = logged = self._clock.now()
        posted, counted, signs, finished = 0, False, -1, 0
        while True:
            if posted != self._reports:
                posted = self._reports
                self._post_status()
            if self._finished and not counted:
                self._count_finished()
                counted = True
            newest_signs = self._store.add("signs", 0)
            now = self._answered = self._clock.now()
            if newest_signs != signs:  # every other change in the store comes with a new sign
                signs, last_sign = newest_signs, now
                finished = self._read_store()
                if self._problem is not None:
                    return
            if finished == self._world:
                return
            if counted and now - last_sign > self._silence:
                self._problem = self._describe_unfinished()
                return
            if now - logged > LOG_EVERY_S:
                logged = now
                _log.info("%d of %d ranks have finished; the last report was: %s", finished, self._world, self._last_status)
            self._changed.wait(self._pause(now - began))
            self._changed.clear()

    def _read_store(self) -> int:
        """Return how many ranks have finished; also read the last report of any rank and whether a rank has failed."""
        self._last_status = self._store.get("last").decode()
        for listener in listeners:
            listener()
        finished, self._abandoned = self._store.add("finished", 0), self._store.add("failed", 0) > 0
        if self._store.check(["left"]):
            self._problem, self._abandoned = self._store.get("left").decode(), True
        return finished

    def _pause(self, elapsed: float) -> float:
        """Return the seconds until the next poll of the store, `elapsed` seconds after the work began.

        The pause is an eighth of `elapsed`, at most 1 s, but longer if there are many ranks.
        """
        return min(self._silence / 8, max(self._world * POLL_S_PER_RANK, min(elapsed / 8, 1.0)))

    def _post_status(self) -> None:
        line = f"rank {self._rank} on {host_name()}: {self._status}"
        self._store.set(f"status/{self._rank}", line)
        self._store.set("last", line)
        self._store.add("signs", 1)

    def _count_finished(self) -> None:
        if self._failed:
            self._store.add("failed", 1)
        self._store.append("who", f"{self._rank} ")  # type: ignore[attr-defined]  # missing in its stubs
        self._store.add("finished", 1)
        self._store.add("signs", 1)

    def _describe_unfinished(self) -> str:
        """Return a message that names the ranks that have not finished, with the last status of each."""
        finished = {int(rank) for rank in self._store.get("who").split()}
        unfinished = [rank for rank in range(self._world) if rank not in finished]
        names = "; ".join(map(self._status_of, unfinished[:MAX_NAMED]))
        rest = f" and {len(unfinished) - MAX_NAMED} more" if len(unfinished) > MAX_NAMED else ""
        return f"there was no sign of progress for {self._silence:g} s from {names}{rest}"

    def _status_of(self, rank: int) -> str:
        key = f"status/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else f"rank {rank}, which has not begun"
