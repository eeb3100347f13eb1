"""A clock that counts only the time in which this process could run.

With it, a job that was suspended for an hour is not mistaken for a job that has hung for an hour.
"""

import threading
import time


class RunningClock:
    """Counts seconds without the time in which the process was suspended (SIGSTOP, a frozen machine).

    Between two calls of `now`, at most `max_gap` seconds are counted. So call it at least that often.
    """

    def __init__(self, max_gap: float) -> None:
        self._max_gap, self._seconds, self._last = max_gap, 0.0, time.monotonic()
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the seconds since the clock was created, without the time in which the process was suspended."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, self._max_gap)
            self._last = now
            return self._seconds
