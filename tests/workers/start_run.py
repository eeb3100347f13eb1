"""Rank process: `start_run.py RANK ARGUMENT ...` trains like train.py, but rank RANK stops itself.

The rank stops by SIGSTOP before the first step.
"""

import os
import signal
import sys

import torch

from raphael_dist import train
from raphael_dist.training import throughput

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, *arguments = sys.argv[1:]
    warmup_step = throughput.warmup_step

    def stopping(*args: object) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        return warmup_step(*args)

    if os.environ["RANK"] == rank:
        throughput.warmup_step = stopping
    sys.exit(train.main(arguments))
