"""Ends a process that never releases Python's lock. That process starts `python interpreter_watchdog.py PID SECONDS TICK`.

A byte on standard input is a sign of life; the end of the input is the end of the process. Without either for SECONDS the
process gets SIGUSR2, upon which faulthandler writes its stacks in C, and is killed. Time in which either process was stopped
does not count: a suspended job has not hung, and a rank that is stopped alone is named by the others.
"""

import contextlib
import os
import select
import signal
import sys
import time


def stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal or a debugger."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def main(pid: int, seconds: float, tick: float) -> None:
    """Watch until the process ends, or has been silent for `seconds`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are for the watched process
        signal.signal(number, signal.SIG_IGN)
    silent, last = 0.0, time.monotonic()
    while silent < seconds:
        ready, _, _ = select.select([0], [], [], tick)
        now = time.monotonic()
        passed, last = min(now - last, 2 * tick), now
        if ready and not os.read(0, 4096):
            return
        silent = 0.0 if ready else silent + (0.0 if stopped(pid) else passed)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(1.0)
        print(
            f"error: process {pid} kept the lock of the Python interpreter for {seconds:g} s, so it is ended",
            file=sys.stderr,
            flush=True,
        )
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
