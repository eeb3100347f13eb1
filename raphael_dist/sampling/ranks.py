"""Ranks that draw together: in a group under a launcher or alone, so that a command has one way for both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from raphael_dist.errors import UserError
from raphael_dist.parallel.ranks import Ranks, discover, gather_objects, initialise

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[tuple[Ranks, torch.device]]:
    """Yield this process among the ranks, and its device; where a group exists already, it is used and stays."""
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        yield Ranks(rank, world, rank, world), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    ranks, before = discover(), dict(os.environ)
    device = initialise(ranks)
    try:
        yield ranks, device
    except UserError as error:
        if ranks.is_main or not error.agreed:
            raise
        raise SystemExit(2) from None  # rank 0 says it for all
    finally:
        dist.destroy_process_group()
        if ranks.launcher == "none":  # another command of this process is alone too
            os.environ.clear()
            os.environ.update(before)


def to_main(mine: dict[int, T]) -> dict[int, T]:
    """Return on rank 0 what all ranks have, {} elsewhere. For what fits into memory: it is pickled. Collective."""
    found = gather_objects(mine)
    return {n: value for part in found for n, value in part.items()} if dist.get_rank() == 0 else {}
