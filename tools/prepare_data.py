"""Computes a run's cached embeddings and latents before it starts: `prepare_data.py --config C --part 3 --parts 16`.

Each part takes every sixteenth shard, on a GPU if there is one; parts may run at the same time on any machines that share
data.cache_dir, and again at any time. slurm/prepare_data.sh runs them as an array job.
"""

import argparse
import sys
from collections.abc import Sequence

from raphael_dist import command_line
from raphael_dist.config import load_config
from raphael_dist.errors import UserError, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config(parser)
    parser.add_argument("--part", type=int, default=0, help="which part, from 0")
    parser.add_argument("--parts", type=int, default=1, help="number of parts")
    return exit_code_of(lambda: prepare(command_line.parse(parser, sys.argv[1:] if argv is None else argv)))


def prepare(args: argparse.Namespace) -> None:
    """Fill the cache. Raises UserError for what the user can fix."""
    config = load_config(args.config, args.overrides)
    if not 0 <= args.part < args.parts:
        raise UserError(f"--part: given {args.part}; allowed 0 to {args.parts - 1}, one less than --parts")
    if not config.data.shards and not config.data.sources:
        raise UserError("data.shards: none given; e.g. data.shards='data/emoji/train-*'")
    import torch

    from raphael_dist.data.open import fill_cache, load_encoders

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, image = load_encoders(config, device, getattr(torch, config.train.dtype))
    for name, training in (("data.shards", True), ("data.val_shards", False)):
        if training or config.data.val_shards:
            built, of = fill_cache(config, text, image, args.part, args.parts, training=training)
            print(f"{name}: {built} of {of} shards computed into {config.data.cache_dir}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
