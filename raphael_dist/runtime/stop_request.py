"""Requests to stop the training early: a signal, the time limit (`--max-time`), or the end of the launcher.

A request concerns one rank. At the end of each step, all ranks agree whether to stop.
"""

import re
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from raphael_dist.errors import UserError
from raphael_dist.runtime.launchers import Process, launchers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<day_clock>\d+(?::\d+){0,2})|(?P<clock>\d+(?::\d+){0,2}))")


class StopRequest:
    """Whether this rank has been asked to stop. Signal handlers only set a flag, so no collective is interrupted."""

    def __init__(self, max_time: float | None = None) -> None:
        """Find the launchers of this process, and start the time limit.

        `max_time`: seconds from now to the time limit; None: no limit.
        """
        self._signal: int | None = None
        self._orphaned = False
        self.launchers = launchers()
        self._deadline = None if max_time is None else time.monotonic() + max_time

    def listen(self) -> None:
        """Treat SIGTERM, SIGINT and SIGUSR1 as requests to stop. Call it in the main thread.

        A second SIGINT (Ctrl-C) ends the process at once.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """Ignore SIGTERM, SIGINT and SIGUSR1 from now on. Call it when the work is saved and the exit code is decided."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop, by a signal, the time limit, or the end of its launcher."""
        if self._signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline):
            return True
        if not self._orphaned and (ended := describe_ended(self.launchers)):
            print(f"warning: {ended}; the run stops", file=sys.stderr, flush=True)
            self._orphaned = True
        return self._orphaned


def describe_ended(processes: Sequence[Process]) -> str:
    """Return a sentence that names the first launcher process that has ended; "" if all of them run."""
    return next((f"the launcher {p.launcher} (process {p.pid}) has ended" for p in processes if not p.alive), "")


def parse_time(text: str) -> float:
    """Convert a time in Slurm's form to seconds: `90` (minutes), `1:30:00`, `2-12:00:00`.

    Raises UserError if `text` has another form.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"--max-time={text} must have the form of Slurm's --time, which is minutes, minutes:seconds, "
            "hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds. Use e.g. "
            "--max-time=2:30:00 for two and a half hours."
        )
    if match["days"] is not None:
        hours, minutes, seconds = ([int(n) for n in match["day_clock"].split(":")] + [0, 0])[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    numbers = [int(n) for n in match["clock"].split(":")]
    if len(numbers) == 1:
        return numbers[0] * 60.0
    hours, minutes, seconds = [0, *numbers][-3:]
    return (hours * 60.0 + minutes) * 60 + seconds
