"""Work that may take longer than a collective may wait, on one rank or on all: the others wait at the ranks' store.

A collective has a time-out, so whoever sits in one while another rank reads a million files dies of it. Here a rank that has
finished asks the process group's store now and then how far the others are, and goes on when all have finished. A rank at
work says what it is doing (`tell`); when no rank has said anything for SILENCE_S seconds, all that wait end with a HungError
that names the ranks without a result. When one fails, the others stop at their next word and all raise what it raised.

What grows with the ranks: they poll the more rarely the more they are, so that the store gets about 2,000 requests a second
from those that wait, and a few more for every word of those at work.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from raphael_dist.errors import HungError
from raphael_dist.parallel.bar import Bar
from raphael_dist.parallel.clock import RunningClock
from raphael_dist.parallel.ranks import TIMEOUT, agree, attempt, host_name

_log = logging.getLogger(__name__)
T = TypeVar("T")
Tell = Callable[[str], None]
SILENCE_S = TIMEOUT.total_seconds()  # as long as a collective would have waited
LOG_EVERY_S = 60.0
POLL_S_PER_RANK = 5e-4  # seconds between two polls of a rank, per rank of the world: 2,000 polls a second in all
_NAMED = 5  # silent ranks that a message names
_numbers = itertools.count()  # all ranks do the same work in the same order
listeners: list[Callable[[], None]] = []  # called at every sign of life of any rank


class AbandonedError(RuntimeError):
    """This rank's work is of no use any more: another's failed."""


def quiet(_: str) -> None:
    """Tell nobody: for work that is done outside a run."""


def together(doing: str, work: Callable[[Tell], T]) -> T:
    """Run `work` on every rank, however long it takes; as `all_or_none`, when it fails on any, raise on all. Collective.

    `work` gets a function to tell how far it is ("shard 12 of 5000"), to be called at least every SILENCE_S seconds, and
    must call no collective. Raises HungError when the ranks that have not finished tell nothing for that long.
    """
    watch = Watch(doing, SILENCE_S)
    with Bar(doing, shown=dist.get_rank() == 0) as bar:

        def tell(words: str) -> None:
            bar.tell(words)
            watch.tell(words)

        result, failure = attempt(lambda: work(tell))
    watch.finish(failed=failure is not None)
    watch.wait()
    return agree(result, None if isinstance(failure, AbandonedError) else failure)


def from_main(doing: str, work: Callable[[Tell], T]) -> T:
    """Return on all ranks what `work` returns on rank 0, which is pickled; what it raises is raised on all. Collective."""
    result = [together(doing, lambda tell: work(tell) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


class Watch:
    """One piece of work, seen from this rank.

    Only a thread of its own talks to the store: that lives in a process which may hang, and requests to it have no time-out.
    """

    def __init__(self, doing: str, silence_s: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._doing, self._silence = doing, silence_s
        store = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.PrefixStore(f"long work {next(_numbers)}", store)
        self._words, self._told = doing, 1
        self._finished = self._failed = self._abandoned = False
        self._last = "nothing"  # the newest words of any rank
        self._problem: str | None = None
        # Polled every few seconds at the most, so that longer gaps are suspensions of this process.
        self._clock = RunningClock(max(2 * self._pause(silence_s), 10.0))
        self._answered = self._clock.now()
        self._news, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._talk, name=doing, daemon=True).start()

    def tell(self, words: str) -> None:
        """Say how far this rank is. Raises AbandonedError when another has failed."""
        self._words, self._told = f"{self._doing}: {words}", self._told + 1
        if self._abandoned:
            raise AbandonedError

    def finish(self, failed: bool) -> None:
        """Say that this rank is done."""
        self._failed, self._finished = failed, True
        self._news.set()

    def wait(self) -> None:
        """Wait until all ranks have finished. Raises HungError when that is not to be expected any more."""
        self._answered = self._clock.now()  # the work may have kept the thread from running
        while not self._over.wait(min(1.0, self._silence / 8)):
            if self._clock.now() - self._answered > self._silence:
                where = "rank 0, or the launcher's agent beside it, which keeps the ranks' store, gives no answer"
                raise HungError(f"{self._doing}: {where} for {self._silence:g} s; last heard: {self._last}")
        if self._problem is not None:
            if self._rank == 0:  # the store may go with this process: let the others find out what it found
                time.sleep(3 * self._pause(self._silence))
            raise HungError(f"{self._doing}: {self._problem}")

    def _talk(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # the process that keeps the store is gone
            self._problem = f"lost the ranks' store ({' '.join(str(error).split())[:200]}); last heard: {self._last}"
        self._over.set()

    def _exchange(self) -> None:
        """Publish this rank's words and learn of the others', until all have finished or none has said anything for long."""
        began = heard = logged = self._clock.now()
        published, counted, signs, done = 0, False, -1, 0
        while True:
            if published != (told := self._told):
                self._say(self._words)
                published = told
            if self._finished and not counted:
                self._count_me()
                counted = True
            found = self._store.add("signs", 0)
            now = self._answered = self._clock.now()
            if found != signs:  # nothing else changes without a sign
                signs, heard, self._last = found, now, self._store.get("last").decode()
                for listener in listeners:
                    listener()
                done, self._abandoned = self._store.add("finished", 0), self._store.add("failed", 0) > 0
            if done == self._world:
                return
            if counted and now - heard > self._silence:
                self._problem = self._accuse()
                return
            if now - logged > LOG_EVERY_S:
                logged = now
                _log.info("%d of %d ranks have finished; last heard: %s", done, self._world, self._last)
            self._news.wait(self._pause(now - began))
            self._news.clear()

    def _pause(self, elapsed: float) -> float:
        """Return the seconds to the next poll: an eighth of what has passed, within bounds that grow with the ranks."""
        return min(self._silence / 8, max(self._world * POLL_S_PER_RANK, min(elapsed / 8, 1.0)))

    def _say(self, words: str) -> None:
        line = f"rank {self._rank} on {host_name()}: {words}"
        self._store.set(f"said/{self._rank}", line)
        self._store.set("last", line)
        self._store.add("signs", 1)

    def _count_me(self) -> None:
        if self._failed:
            self._store.add("failed", 1)
        self._store.append("who", f"{self._rank} ")
        self._store.add("finished", 1)
        self._store.add("signs", 1)

    def _accuse(self) -> str:
        """Return which ranks have not finished, and what they said last."""
        finished = {int(rank) for rank in self._store.get("who").split()}
        missing = [rank for rank in range(self._world) if rank not in finished]
        said = [self._said(rank) for rank in missing[:_NAMED]]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return f"no sign of progress for {self._silence:g} s from {'; '.join(said)}{more}"

    def _said(self, rank: int) -> str:
        key = f"said/{rank}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else f"rank {rank}, which never began"
