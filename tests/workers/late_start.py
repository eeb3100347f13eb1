"""Rank: trains as the command line does, but one rank stops itself by SIGSTOP during the start of the run.

The keys of the argument `spec` are
    rank: the rank that stops
    at: when it stops: "never": before it contacts other ranks; "met": after all ranks have contacted each other; "locking":
        before it waits for rank 0 to lock the run directory; "logging": after it has started logging
    arguments: command line of train.py
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
    """Stop this process by SIGSTOP after the next call of the function `name` of the module or class `owner`."""
    real: Callable[..., Any] = getattr(owner, name)

    def stopping(*args: Any) -> Any:
        result = real(*args)
        os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(owner, name, stopping)


def main(spec: dict[str, Any]) -> int:
    """Train with spec["arguments"], and stop if this is the rank to stop; return the exit code."""
    torch.set_num_threads(1)
    if int(os.environ["RANK"]) == spec["rank"]:
        if spec["at"] == "never":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif spec["at"] == "met":
            stop_after(rendezvous, "wait_for_all")
        elif spec["at"] == "locking":
            stop_after(startup, "long_work")
        elif spec["at"] == "logging":
            stop_after(run_dir, "start_logging")
    return train.main(spec["arguments"])
