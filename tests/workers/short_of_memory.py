"""Rank: saves a checkpoint by the command line's loop, while one rank has no memory for it.

spec: rank: which one; where: "prepare" or "take" of the snapshot, "begin" of the save, or "kill", as the system does it;
arguments: of the command line.
"""

import os
import signal
from typing import Any

import torch

from raphael_dist import train
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.checkpoint.snapshot import Snapshot


def main(spec: dict[str, Any]) -> int:
    """Return the exit code of the command line."""
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
