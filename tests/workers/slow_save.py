"""Rank: saves a checkpoint, while one rank writes longer than the time-out of collectives (see tests/lib/forks.py).

The keys of the argument `spec` are
    folder: the run directory
    at: the slow rank
    seconds: how much longer it writes
    collective_s: time-out of collectives in seconds
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from raphael_dist.checkpoint import save
from raphael_dist.checkpoint.progress import Progress
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.ranks import discover, initialise
from tests.lib.synthetic import plain_fragments, tiny_config


def main(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    ranks, write = discover(), save.write_snapshot
    initialise(ranks, timedelta(seconds=spec["collective_s"]))

    def slowly(*arguments: Any) -> dict[str, Any]:
        report: Callable[[str], None] = arguments[-1]
        for i in range(int(spec["seconds"]) if ranks.rank == spec["at"] else 0):
            report(f"piece {i}")
            time.sleep(1)
        return write(*arguments)

    save.write_snapshot = slowly  # type: ignore[assignment]
    Path(spec["folder"], "checkpoints").mkdir(exist_ok=True)  # as locking a run directory does
    config = tiny_config(run={"dir": spec["folder"]})
    torch.manual_seed(0)
    saved = save.CheckpointStore(config, ranks, plain_fragments(RaphaelUNet(config)), None, {"data.shards": "synthetic"})
    saved.save(Progress(1, 12, 1, {}))
    return 0
