"""When to stop early: a signal, or the time that was given. A request of this rank; ranks agree on it at a step's end."""

import re
import signal
import time
from types import FrameType

from raphael_dist.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, and days-hours with what follows.
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<day_clock>\d+(?::\d+){0,2})|(?P<clock>\d+(?::\d+){0,2}))")


class StopRequest:
    """Whether this rank wants to stop, and why. Handlers only set a flag, so that no collective is torn.

    `max_time`: seconds from now after which it wants to by itself; None: never.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self._signal: int | None = None
        self._deadline = None if max_time is None else time.monotonic() + max_time

    def listen(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1; a second SIGINT interrupts at once. For the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """Let no further signal end the process: its work is saved and its exit code is decided."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def wanted(self) -> bool:
        """Whether to stop, as far as this rank is concerned."""
        return self._signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)


def parse_time(text: str) -> float:
    """Return the seconds of a time as Slurm writes it: `90` (minutes), `1:30:00`, `2-12:00:00`. UserError else."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"--max-time: given {text!r}; written like Slurm's --time: minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours, days-hours:minutes or days-hours:minutes:seconds"
        )
    if match["days"] is not None:
        hours, minutes, seconds = ([int(n) for n in match["day_clock"].split(":")] + [0, 0])[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    numbers = [int(n) for n in match["clock"].split(":")]
    if len(numbers) == 1:
        return numbers[0] * 60.0
    hours, minutes, seconds = [0, *numbers][-3:]
    return (hours * 60.0 + minutes) * 60 + seconds
