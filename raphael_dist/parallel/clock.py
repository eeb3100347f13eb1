"""Time during which this process was able to run: a job that is suspended for an hour has not hung for an hour."""

import threading
import time


class RunningClock:
    """Seconds, of which a gap between two looks counts `most` at the most: longer ones are suspensions (SIGSTOP, a frozen
    machine). So it must be looked at more often than that by whoever relies on it.
    """

    def __init__(self, most: float) -> None:
        self._most, self._seconds, self._last = most, 0.0, time.monotonic()
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the seconds since the clock was made, without suspensions."""
        with self._lock:
            at = time.monotonic()
            self._seconds += min(at - self._last, self._most)
            self._last = at
            return self._seconds
