"""Rank process: `hang_run.py HOW RANK ARGUMENT ...` trains like train.py, but rank RANK fails at its 12th micro-batch.

HOW is one of:
- stop: the rank stops itself by SIGSTOP
- data: its data loader sleeps
- lock: C code sleeps and keeps the global interpreter lock
- slow: each forward pass takes 0.5 seconds longer
- raise: the forward pass raises an error
"""

import ctypes
import os
import signal
import sys
import time
from typing import Any

import torch

from raphael_dist import train
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.model.unet import RaphaelUNet

AFTER = 12


def wrap(owner: type, name: str, fault: Any) -> None:
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] >= AFTER:
            fault()
        return original(*args)

    setattr(owner, name, wrapped)


def bug() -> None:
    raise ZeroDivisionError("a bug on one rank")


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if how == "data":
            wrap(BatchBuilder, "build", lambda: time.sleep(1000))
        faults = {
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "lock": lambda: ctypes.PyDLL(None).sleep(1000),
            "slow": lambda: time.sleep(0.5),
            "raise": bug,
        }
        if how in faults:
            wrap(RaphaelUNet, "forward", faults[how])
    sys.exit(train.main(arguments))
