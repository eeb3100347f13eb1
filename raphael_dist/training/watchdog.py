"""Ends a run that hangs: a thread beside the training thread knows when the last sign of progress is too long ago.

It watches the progress of the loop, not process groups, so a hang in any of them counts, of experts too. Every rank leaves a
heartbeat in a file of the run directory; the rank that runs out of patience reads all of them, names who is behind, writes
every thread's stack to `logs/stacks-rank-N.txt` and leaves with EXIT_HUNG, after which the launcher ends the others.

A thread that never gives up the interpreter lock would stop this one too. The last resort is a timer of faulthandler, in C,
that this thread winds up again and again: when it no longer can, the timer writes the stacks and ends the process.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from raphael_dist.errors import EXIT_HUNG, leave_exit_code
from raphael_dist.parallel.ranks import Ranks, host_name

_log = logging.getLogger(__name__)
# The first step, validation, sampling and saving may take this many times as long as a step.
SLOW = 5.0


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said: where it is, and when. `beats` counts its signs of progress; all ranks make the same ones."""

    rank: int
    host: str
    beats: int
    where: str
    time: float = 0.0  # when it was written, by the clock of the file system


class Watchdog:
    """Context around the loop; `beat` says that it moves. Ends the process when nothing is said for `timeout_s` seconds."""

    def __init__(self, ranks: Ranks, run_dir: Path, timeout_s: float) -> None:
        self._ranks, self._timeout = ranks, timeout_s
        self._folder, self._host = run_dir / "logs", host_name()
        self._beats, self._where = 0, "start"
        self._deadline = time.monotonic() + timeout_s * SLOW
        self._tick = min(30.0, timeout_s / 8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: TextIO | None = None

    def beat(self, where: str, patience: float = 1.0) -> None:
        """Say that the loop has come to `where` and should get on within `patience` times the time-out."""
        self._beats, self._where = self._beats + 1, where
        self._deadline = time.monotonic() + self._timeout * patience

    def __enter__(self) -> "Watchdog":
        (self._folder / "heartbeats").mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._folder / f"stacks-rank-{self._ranks.rank}.txt", "w")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        assert self._stacks is not None
        self._stacks.close()
        for path in (self._path(self._ranks.rank), Path(self._stacks.name)):
            path.unlink(missing_ok=True)

    def _watch(self) -> None:
        assert self._stacks is not None
        while True:
            # Time for this thread to come round again, which it does unless the lock is held. After the others' deadline, so
            # that they can name this rank first.
            faulthandler.dump_traceback_later(self._timeout + 2 * self._tick, file=self._stacks, exit=True)
            with contextlib.suppress(OSError):  # a full disk is not a hang
                self._publish()
            if self._ended.wait(self._tick):
                return
            if time.monotonic() > self._deadline:
                self._give_up()

    def _path(self, rank: int) -> Path:
        return self._folder / "heartbeats" / f"rank-{rank:05d}"

    def _publish(self) -> None:
        mine = Heartbeat(self._ranks.rank, self._host, self._beats, self._where)
        path = self._path(self._ranks.rank)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(mine)))
        temporary.replace(path)

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._publish()
        time.sleep(min(self._tick, 1.0))  # the others are about to say where they are, too
        accused = blame(found := self._read(), self._tick)
        message = f"no progress for {self._timeout:g} s at {self._where}: {accused}"
        _log.error("%s; stacks of this rank: %s", message, getattr(self._stacks, "name", ""))
        print(f"error on rank {self._ranks.rank} ({self._host}): {message}", file=sys.stderr, flush=True)
        assert self._stacks is not None
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        leave_exit_code(EXIT_HUNG)
        if silent(found, self._tick):
            time.sleep(
                4 * self._tick
            )  # its timer is about to write its stacks; when this rank ends, the launcher ends it too
        os._exit(EXIT_HUNG)  # the training thread is stuck: nothing less ends it

    def _read(self) -> list[Heartbeat]:
        found = []
        for rank in range(self._ranks.world_size):
            try:
                with open(self._path(rank)) as file:
                    found.append(Heartbeat(**{**json.load(file), "time": os.fstat(file.fileno()).st_mtime}))
            except (OSError, ValueError, TypeError):
                found.append(Heartbeat(rank, "an unknown host", -1, "no heartbeat"))
        return found


def silent(heartbeats: list[Heartbeat], tick: float) -> list[Heartbeat]:
    """Return the ranks without a sign of life for longer than a few ticks: stopped, dead, or kept from running."""
    newest = max(h.time for h in heartbeats)
    return [h for h in heartbeats if newest - h.time > 3 * tick]


def blame(heartbeats: list[Heartbeat], tick: float) -> str:
    """Say which ranks are behind: fewer signs of progress than the others, or no sign of life at all.

    `tick`: seconds between two signs of life of a healthy rank.
    """
    newest, most = max(h.time for h in heartbeats), max(h.beats for h in heartbeats)
    dead = silent(heartbeats, tick)
    behind = [h for h in heartbeats if h.beats < most and h not in dead]
    said = [f"rank {h.rank} on {h.host} has given no sign of life {_since(newest - h.time)} (last: {h.where})" for h in dead]
    said += [f"rank {h.rank} on {h.host} is behind, at {h.where}" for h in behind]
    more = f" and {len(said) - 5} more" if len(said) > 5 else ""
    return "; ".join(said[:5]) + more if said else f"all {len(heartbeats)} ranks are at the same place"


def _since(seconds: float) -> str:
    return "yet" if seconds > 1e8 else f"for {seconds:.0f} s"
