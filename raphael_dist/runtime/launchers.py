"""Finds the launcher processes that started this rank. A rank whose launcher has ended must end itself.

SIGTERM or SIGKILL to `deepspeed` alone ends neither the process that `deepspeed` started nor the ranks. Launchers are
recognised by their command lines, because other ancestors, such as the shell that started a run in the background, may end
earlier.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = {
    "deepspeed", "torchrun", "accelerate", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "orted", "prted",
    "hydra_pmi_proxy", "slurmstepd",
}  # fmt: skip
_MODULES = {
    "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run",
    "torch.distributed.launch", "accelerate.commands.launch",
}  # fmt: skip
_PYTHON = re.compile(r"python[\d.]*")


@dataclass(frozen=True)
class Process:
    """A process of a launcher, i.e. of a program such as torchrun or mpirun that starts ranks.

    Attributes:
        pid: its process id.
        began: its start time, in clock ticks since boot. A later process with the same id has another start time.
        launcher: name of the launcher.
    """

    pid: int
    began: int
    launcher: str

    @property
    def alive(self) -> bool:
        """Whether this process still runs. Another process that got the same id later does not count."""
        fields = _stat(self.pid)
        return alive(self.pid) and fields is not None and int(fields[19]) == self.began


def launchers() -> list[Process]:
    """Return the ancestors (parent, its parent, ...) of this process that are launchers (torchrun etc.), nearest first."""
    processes, pid = [], os.getppid()
    while pid > 1 and (fields := _stat(pid)) is not None:
        if launcher := _launcher(pid):
            processes.append(Process(pid, int(fields[19]), launcher))
        pid = int(fields[1])
    return processes


def alive(pid: int) -> bool:
    """Return whether a process with the id `pid` runs (a zombie does not)."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat, beginning with the process state; None if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None


def _launcher(pid: int) -> str:
    """Return the name of the launcher that runs in a process; "" if none does."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return launcher_in(words)
    return ""


def launcher_in(words: list[str]) -> str:
    """Return the name of the launcher of ranks that a command line runs; "" if it runs no known launcher.

    The known launchers are the programs in `_PROGRAMS`, such as "torchrun", and the Python modules in `_MODULES`, such as
    "torch.distributed.run". `words`: the command line, as a list of words. The first is the path of the program.
    """
    # slurmstepd writes its title as one word: "slurmstepd: [123.0]".
    program = Path(words[0].split(":")[0]).name
    arguments = words[1:]
    if _PYTHON.fullmatch(program):
        while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
            arguments = arguments[1:]
        if arguments[:1] == ["-m"]:
            return arguments[1] if len(arguments) > 1 and arguments[1] in _MODULES else ""
        program = Path(arguments[0]).name if arguments else ""
    return program if program in _PROGRAMS else ""
