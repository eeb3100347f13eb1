"""Rank: trains as the command line does, but one rank has not enough memory to save a checkpoint.

The keys of the argument `spec` are
    rank: the rank without memory
    where: what raises MemoryError: "prepare" or "take": that method of `Snapshot`; "begin": the begin of the save. "kill":
        the rank is killed when the save begins, as the system kills a process if memory is exhausted
    arguments: command line of train.py
"""

import os
import signal
from typing import Any

import torch

from raphael_dist import train
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.checkpoint.snapshot import Snapshot


def main(spec: dict[str, Any]) -> int:
    """Train with spec["arguments"], with the fault on the rank spec["rank"]; return the exit code."""
    torch.set_num_threads(1)

    def fail(*_: Any) -> Any:
        if spec["where"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError

    if int(os.environ["RANK"]) == spec["rank"]:
        if spec["where"] in ("prepare", "take"):
            setattr(Snapshot, spec["where"], fail)
        else:
            CheckpointStore.begin = fail  # type: ignore[method-assign]
    return train.main(spec["arguments"])
