"""Ends a process whose thread never releases Python's global interpreter lock (GIL).

The watched process, whose id is PID, starts `python interpreter_watchdog.py PID SECONDS TICK`. The watched process sends
bytes to the standard input of this program as signs of life. This program waits for a byte for at most TICK seconds at a
time, and ends when the input ends. If no byte comes for SECONDS although the input has not ended, the watched process gets
SIGUSR2, for which faulthandler writes the stacks of its threads. Then the watched process is killed.

Time in which either process was suspended does not count. A suspended job has not hung; and if only one rank is suspended,
the other ranks report it.
"""

import contextlib
import os
import select
import signal
import sys
import time


def stopped(pid: int) -> bool:
    """Return whether the process `pid` is suspended by a signal or a debugger."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def main(pid: int, seconds: float, tick: float) -> None:
    """Watch the process `pid`: kill it if no byte arrives on standard input for `seconds`. Return when the input ends.

    Each byte is a sign of life from that process. Time in which it was suspended does not count. `tick`: seconds between two
    checks.
    """
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
            f"error: process {pid} kept the lock of the Python interpreter (GIL) for {seconds:g} s and is killed now",
            file=sys.stderr,
            flush=True,
        )
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
