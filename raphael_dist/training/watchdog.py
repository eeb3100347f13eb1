"""Ends a run that hangs: a thread beside the training thread knows when the last sign of progress is too long ago.

It watches the progress of the loop, not process groups, so a hang in any of them counts, of experts too. Every rank leaves a
heartbeat in a file of the run directory; the rank that runs out of patience reads all of them, names who is behind, writes
every thread's stack to `logs/stacks-rank-N.txt` and leaves with EXIT_HUNG, after which the launcher ends the others.

A thread that never gives up the interpreter lock would stop this one too. The last resort is a small process beside each
rank (last_resort.py), which gets a byte from this thread now and then, and ends the rank when none comes any more.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from raphael_dist.errors import EXIT_HUNG, cannot_write, leave_exit_code
from raphael_dist.parallel import long_work
from raphael_dist.parallel.clock import RunningClock
from raphael_dist.parallel.ranks import Ranks, host_name
from raphael_dist.storage.files import replace_bytes

_log = logging.getLogger(__name__)
# Start-up, the first step, validation, sampling and saving may take this many times as long as a step.
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
    """Watches from `start` to `stop`; `beat` says that the run moves. Ends the process when it does not for `timeout_s`.

    What `long_work` hears of other ranks counts too. Time in which the process was suspended does not count.
    """

    def __init__(self, ranks: Ranks, run_dir: Path, timeout_s: float) -> None:
        self._ranks, self._timeout = ranks, timeout_s
        self._folder, self._host = run_dir / "logs", host_name()
        self._beats, self._where = 0, "start"
        self._tick = min(30.0, timeout_s / 8)
        self._clock = RunningClock(4 * self._tick)
        self._deadline, self._patience = timeout_s * SLOW, SLOW
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: TextIO | None = None
        self._last_resort: subprocess.Popen[bytes] | None = None

    def beat(self, where: str, patience: float = 1.0) -> None:
        """Say that the loop has come to `where` and should get on within `patience` times the time-out."""
        self._beats, self._where = self._beats + 1, where
        self._patience = patience
        self._extend()

    def _extend(self) -> None:
        self._deadline = self._clock.now() + self._timeout * self._patience

    def start(self) -> "Watchdog":
        """Begin to watch, with the patience of a step's slowest part. UserError, or NotSavedError on a full disk."""
        self._extend()
        try:
            (self._folder / "heartbeats").mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._folder / f"stacks-rank-{self._ranks.rank}.txt", "w")
        except OSError as error:
            raise cannot_write(self._folder, error) from None
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        # After the others' deadline, so that they can name this rank first.
        patience = [str(seconds) for seconds in (self._timeout + 2 * self._tick, self._tick)]
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("last_resort.py")), str(os.getpid()), *patience]
        self._last_resort = subprocess.Popen(command, stdin=subprocess.PIPE)
        long_work.listeners.append(self._extend)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Watch no longer, and leave nothing behind."""
        long_work.listeners.remove(self._extend)
        self._ended.set()
        self._thread.join()
        assert self._stacks is not None
        assert self._last_resort is not None
        with contextlib.suppress(OSError):
            self._last_resort.communicate()  # the end of its input is its end
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        for path in (self._path(self._ranks.rank), Path(self._stacks.name)):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "Watchdog":
        return self if self._thread.is_alive() else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _watch(self) -> None:
        assert self._last_resort is not None
        assert self._last_resort.stdin is not None
        while True:
            with contextlib.suppress(OSError):
                os.write(self._last_resort.stdin.fileno(), b".")
            with contextlib.suppress(OSError):  # a full disk is not a hang
                self._publish()
            if self._ended.wait(self._tick):
                return
            if self._clock.now() > self._deadline:
                self._give_up()

    def _path(self, rank: int) -> Path:
        return self._folder / "heartbeats" / f"rank-{rank:05d}"

    def _publish(self) -> None:
        mine = Heartbeat(self._ranks.rank, self._host, self._beats, self._where)
        replace_bytes(self._path(self._ranks.rank), json.dumps(asdict(mine)).encode(), durable=False)

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._publish()
        time.sleep(min(self._tick, 1.0))  # the others are about to say where they are, too
        accused = blame(found := self._read(), self._tick)
        message = f"no progress for {self._timeout * self._patience:g} s at {self._where}: {accused}"
        _log.error("%s; stacks of this rank: %s", message, getattr(self._stacks, "name", ""))
        print(f"error on rank {self._ranks.rank} ({self._host}): {message}", file=sys.stderr, flush=True)
        assert self._stacks is not None
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        leave_exit_code(EXIT_HUNG)
        if silent(found, self._tick):
            # The silent rank's last resort is about to write its stacks; when this rank ends, the launcher ends that one.
            time.sleep(4 * self._tick)
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
