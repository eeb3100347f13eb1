"""Rank process: `train_run.py ARGUMENT ...` is `raphael_dist/train.py ARGUMENT ...` with one thread per rank."""

import sys

import torch

from raphael_dist import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(train.main(sys.argv[1:]))
