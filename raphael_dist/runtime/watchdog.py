"""Ends a run that hangs. A thread on each rank follows the progress of the training thread.

The thread watches the training loop and not the process groups, so it detects a hang in any process group. Each rank writes
its heartbeat (the place that its training loop has reached) to a file in the run directory. When the timeout of a rank is
over, this rank reads the heartbeats of all ranks, reports the ranks that are behind, writes the stacks of its own threads to
`logs/stacks-rank-N.txt`, and exits with EXIT_HUNG. The launcher then ends the other ranks.

The watchdog starts before the ranks form a process group. Until the run directory is open, the ranks write their heartbeats
to torch.distributed's key-value store (rendezvous.py).

A thread that never releases Python's global interpreter lock would also stop the watchdog thread. Therefore each rank starts
a small process (interpreter_watchdog.py). The small process receives a byte from the watchdog thread at every tick, and
kills the rank if no byte arrives.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from raphael_dist.errors import EXIT_HUNG, EXIT_INTERRUPTED, write_error, write_exit_code
from raphael_dist.runtime import long_work, rendezvous
from raphael_dist.runtime.clock import RunningClock
from raphael_dist.runtime.launchers import Process, alive
from raphael_dist.runtime.ranks import Ranks, host_name
from raphael_dist.runtime.stop_request import describe_ended
from raphael_dist.storage.files import no_links, replace_bytes
from raphael_dist.text import print_line

_log = logging.getLogger(__name__)
# Timeout factor of start-up, the first step, validation, sampling and saving.
SLOW = 5.0


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank.

    Attributes:
        rank, host: the rank and the name of its host.
        count: number of its heartbeats so far. Ranks that make progress have equal counts. -1: there is no heartbeat yet.
        where: the place that its training loop has reached, as a string for messages, e.g. "step 12".
        time: when it was written, in seconds since 1970, by the clock of the file system; before there is a run directory,
            by the clock of the host.
        pid: process id; 0: the process is about to end itself, so that other ranks do not report it as killed.
    """

    rank: int
    host: str
    count: int
    where: str
    time: float = 0.0
    pid: int = 0


class Watchdog:
    """Ends the process if `heartbeat` is not called for `timeout_s` seconds, between `start` and `stop`.

    A progress report of any rank in `long_work` (work of unknown length, e.g. reading files) counts as a heartbeat. Time in
    which the process was suspended does not count.
    """

    def __init__(self, ranks: Ranks, run_dir: Path, timeout_s: float, launchers: Sequence[Process] = ()) -> None:
        """Create the watchdog.

        Args:
            ranks: this rank.
            run_dir: the run directory.
            timeout_s: longest time between two heartbeats, in seconds.
            launchers: processes whose end also ends this process during start-up. (In training, their end is a request to
                stop.)
        """
        self._ranks, self._timeout, self._launchers = ranks, timeout_s, launchers
        self._folder, self._host = run_dir / "logs", host_name()
        self._count, self._where, self._pid = 0, "start", os.getpid()
        self._local_pids: set[int] = set()  # processes of ranks on this host that have been running
        self._killed = ""
        self._tick = min(30.0, timeout_s / 8)
        self._clock = RunningClock(4 * self._tick)
        self._timeout_factor = SLOW
        self._deadline = timeout_s * SLOW
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: TextIO | None = None  # open once there is a run directory
        self._interpreter_watchdog: subprocess.Popen[bytes] | None = None

    def heartbeat(self, where: str, timeout_factor: float = 1.0) -> None:
        """Record that the training loop has reached `where`, a string for messages such as "step 12".

        If the next call does not come within `timeout_factor` times the timeout, the process is ended.
        """
        self._count, self._where, self._timeout_factor = self._count + 1, where, timeout_factor
        self._extend()
        if self._stacks is None:
            rendezvous.post_status(self._line())

    def _extend(self) -> None:
        self._deadline = self._clock.now() + self._timeout * self._timeout_factor

    def start(self) -> Self:
        """Start to watch, and return self. Until the first heartbeat, the timeout is 5 times as long (SLOW).

        It writes no file before `use_folder` is called.
        """
        self._extend()
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the process has no standard error
            faulthandler.register(signal.SIGUSR2, all_threads=True)
        program = str(Path(__file__).with_name("interpreter_watchdog.py"))
        # It acts after the others' deadline, so that they can name this rank first.
        timeout, tick = str(self._timeout + 2 * self._tick), str(self._tick)
        command = [sys.executable, "-I", "-S", program, str(os.getpid()), timeout, tick]
        self._interpreter_watchdog = subprocess.Popen(command, stdin=subprocess.PIPE)
        long_work.listeners.append(self._extend)
        self._thread.start()
        return self

    def use_folder(self) -> None:
        """From now on, write heartbeats, and the stack traces of a hang, to files in the run directory.

        Raises NotSavedError if the disk is full, and UserError if the directory cannot be written.
        """
        try:
            (self._folder / "heartbeats").mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._folder / f"stacks-rank-{self._ranks.rank}.txt", "w", opener=no_links)
        except OSError as error:
            raise write_error(self._folder, error) from None
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._publish()

    def stop(self) -> None:
        """Stop watching, and remove this rank's heartbeat and stack files. It may be called twice."""
        if self._ended.is_set():
            return
        long_work.listeners.remove(self._extend)
        self._ended.set()
        self._thread.join()
        assert self._interpreter_watchdog is not None
        with contextlib.suppress(OSError):
            self._interpreter_watchdog.communicate()  # ends it by closing its input
        faulthandler.unregister(signal.SIGUSR2)
        if self._stacks is not None:
            self._stacks.close()
            for path in (self._path(self._ranks.rank), Path(self._stacks.name)):
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._launchers = ()
        if not self._thread.is_alive():
            self.start().use_folder()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _watch(self) -> None:
        assert self._interpreter_watchdog is not None
        assert self._interpreter_watchdog.stdin is not None
        while True:
            with contextlib.suppress(OSError):
                os.write(self._interpreter_watchdog.stdin.fileno(), b".")
            self._publish()
            if self._ended.wait(self._tick):
                return
            if self._clock.now() > self._deadline or self._killed:
                self._end_process()
            self._killed = self._find_killed_rank()  # acts at the next tick, unless the other rank's end ends this one first
            if ended := describe_ended(self._launchers):
                print(
                    f"error on rank {self._ranks.rank}: {ended} while the run was starting. Start the same command again.",
                    file=sys.stderr,
                )
                write_exit_code(EXIT_INTERRUPTED)
                os._exit(EXIT_INTERRUPTED)

    def _path(self, rank: int) -> Path:
        return self._folder / "heartbeats" / f"rank-{rank:05d}"

    def _line(self) -> str:
        return json.dumps(asdict(Heartbeat(self._ranks.rank, self._host, self._count, self._where, time.time(), self._pid)))

    def _publish(self) -> None:
        if self._stacks is None:  # in a thread, since the store may be kept by a process that hangs
            threading.Thread(target=rendezvous.post_status, args=(self._line(),), daemon=True).start()
            return
        with contextlib.suppress(OSError):  # a full disk is not a hang
            replace_bytes(self._path(self._ranks.rank), self._line().encode(), durable=False)

    def _find_killed_rank(self) -> str:
        """Return a message about a rank of this host whose process was killed (its heartbeat file remains); "" if none."""
        first = self._ranks.rank - self._ranks.local_rank
        for rank in range(first, first + self._ranks.local_world_size) if self._stacks is not None else ():
            heartbeat = self._read_file(rank)
            if heartbeat.host != self._host or not heartbeat.pid:
                continue
            if alive(heartbeat.pid):
                self._local_pids.add(heartbeat.pid)
            elif heartbeat.pid in self._local_pids:  # else the file is of an earlier run
                return (
                    f"rank {rank} on {self._host} (process {heartbeat.pid}) was killed at {heartbeat.where}. If the system "
                    "killed it for lack of memory, dmesg reports this"
                )
        return ""

    def _end_process(self) -> None:
        """Report which ranks are behind, write this rank's stacks and exit with EXIT_HUNG."""
        self._publish()
        time.sleep(min(self._tick, 1.0))  # the other ranks are about to publish theirs
        heartbeats = self._read_heartbeats()
        stragglers = describe_stragglers(heartbeats, self._tick) if heartbeats else rendezvous.no_answer()
        if stragglers.startswith("all ") and not self._killed:
            stragglers += self._describe_links(heartbeats)
        timeout = self._timeout * self._timeout_factor
        message = self._killed or f"there was no progress for {timeout:g} s at {self._where}: {stragglers}"
        self._pid = 0
        self._publish()
        print_line(f"error on rank {self._ranks.rank} ({self._host}): {message}", file=sys.stderr)
        if self._stacks is not None:
            _log.error("%s; stacks of this rank: %s", message, self._stacks.name)
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(self._stacks, all_threads=True)
        write_exit_code(EXIT_HUNG)
        if not heartbeats or silent(heartbeats, self._tick):
            # The silent rank's interpreter watchdog is about to write its stacks; the launcher ends it with this rank.
            time.sleep(4 * self._tick)
        os._exit(EXIT_HUNG)  # the training thread is stuck: nothing less ends it

    def _describe_links(self, heartbeats: list[Heartbeat]) -> str:
        """Return a text that names ranks whose messages do not reach this rank over the network; "" if there are none.

        `heartbeats`: the last heartbeat of each rank, which states its host.
        """
        # Ranks that wait at the same place time out within one tick of each other.
        seconds = self._tick + rendezvous.ANSWER_S
        missing = rendezvous.unreachable(self._ranks.rank, self._ranks.world_size, seconds)
        names = rendezvous.join_first([f"rank {rank} on {heartbeats[rank].host}" for rank in missing], ", ")
        return f", and {names} cannot be reached from {self._host}: check the network between them" if missing else ""

    def _read_heartbeats(self) -> list[Heartbeat]:
        """Return the last heartbeat of every rank; [] if they are in the key-value store and it does not answer."""
        if self._stacks is None:
            return _newest(rendezvous.read_status(), self._ranks.world_size)
        return [self._read_file(rank) for rank in range(self._ranks.world_size)]

    def _read_file(self, rank: int) -> Heartbeat:
        try:
            with open(self._path(rank)) as file:
                return Heartbeat(**{**json.load(file), "time": os.fstat(file.fileno()).st_mtime})
        except (OSError, ValueError, TypeError):
            return _missing(rank)


def _missing(rank: int) -> Heartbeat:
    return Heartbeat(rank, "", -1, "")


def _newest(lines: list[str] | None, world_size: int) -> list[Heartbeat]:
    """Return the last heartbeat of each rank; [] if `lines` is None.

    `lines`: all heartbeats that ranks wrote to torch.distributed's key-value store, as JSON, oldest first.
    """
    if lines is None:
        return []
    newest = {rank: _missing(rank) for rank in range(world_size)}
    for line in lines:
        heartbeat = Heartbeat(**json.loads(line))
        newest[heartbeat.rank] = heartbeat
    return list(newest.values())


def silent(heartbeats: list[Heartbeat], tick: float) -> list[Heartbeat]:
    """Return the heartbeats that are more than three ticks older than the newest one.

    The ranks of these heartbeats are suspended, dead, or get no processor time.

    Args:
        heartbeats: the last heartbeat (sign of life) of each rank.
        tick: seconds between two heartbeats of a healthy rank.
    """
    newest = max(h.time for h in heartbeats)
    return [h for h in heartbeats if newest - h.time > 3 * tick]


def describe_stragglers(heartbeats: list[Heartbeat], tick: float) -> str:
    """Return a sentence that names the ranks that are behind, or states that no rank is.

    A rank is behind if it has fewer heartbeats than other ranks, or has not written one for more than three ticks.

    Args:
        heartbeats: the last heartbeat (sign of life) of each rank.
        tick: seconds between two heartbeats of a healthy rank.
    """
    newest, highest = max(h.time for h in heartbeats), max(h.count for h in heartbeats)
    dead = silent(heartbeats, tick)
    behind = [h for h in heartbeats if h.count < highest and h not in dead]
    lines = [_describe_silent(h, newest) for h in dead]
    lines += [f"rank {h.rank} on {h.host} is behind, at {h.where}" for h in behind]
    return rendezvous.join_first(lines, "; ") if lines else "all ranks have reached the same point"


def _describe_silent(heartbeat: Heartbeat, newest: float) -> str:
    if heartbeat.count < 0:
        return f"rank {heartbeat.rank} is missing and has given no sign of life yet"
    seconds = newest - heartbeat.time
    return (
        f"rank {heartbeat.rank} on {heartbeat.host} has given no sign of life for {seconds:.0f} s (last: {heartbeat.where})"
    )
