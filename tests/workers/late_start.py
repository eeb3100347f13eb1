"""Rank: trains by the command line, but one rank is stopped on the way into the run.

spec: rank: which one; at: "never" (before it meets the others), "met", "claiming" (before it waits
for rank 0 to lock the run directory), "logging" (once the log folder is there);
arguments: of the command line.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from raphael_dist import train
from raphael_dist.runtime import rendezvous
from raphael_dist.training import run_dir, startup


def stop_after(owner: Any, name: str) -> None:
    """Stop this process once a function has returned."""
    real: Callable[..., Any] = getattr(owner, name)

    def stopping(*args: Any) -> Any:
        result = real(*args)
        os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(owner, name, stopping)


def main(spec: dict[str, Any]) -> int:
    """Return the exit code of the command line."""
    torch.set_num_threads(1)
    if int(os.environ["RANK"]) == spec["rank"]:
        if spec["at"] == "never":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif spec["at"] == "met":
            stop_after(rendezvous, "wait_for_all")
        elif spec["at"] == "claiming":
            stop_after(startup, "long_work")
        elif spec["at"] == "logging":
            stop_after(run_dir, "start_logging")
    return train.main(spec["arguments"])
