"""Creates the process group of a sampling command, from the ranks of a launcher or from this process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from raphael_dist.errors import UserError
from raphael_dist.runtime.ranks import Ranks, discover, gather_objects, initialise

T = TypeVar("T")


@contextmanager
def join_ranks() -> Iterator[tuple[Ranks, torch.device]]:
    """Return a context manager that creates torch.distributed's process group, and destroys it at the end.

    The group's ranks are those of a launcher, or this process alone. The context yields `Ranks` (this rank and the number of
    ranks) and this rank's device. A process group that exists already is used and not destroyed.
    """
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
        raise SystemExit(2) from None  # rank 0 prints the message
    finally:
        dist.destroy_process_group()
        if ranks.launcher == "none":  # the next command of this process must not find a launcher's variables
            os.environ.clear()
            os.environ.update(before)


def gather_to_rank0(local: dict[int, T]) -> dict[int, T]:
    """Return the union of the dicts of all ranks on rank 0, and {} on other ranks. Collective.

    `local`: this rank's dict, whose keys must differ from those of other ranks. It should be small, because it is pickled.
    """
    gathered = gather_objects(local)
    return {n: value for part in gathered for n, value in part.items()} if dist.get_rank() == 0 else {}
