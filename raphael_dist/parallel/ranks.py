"""Who am I among the ranks, and how do ranks decide together.

Ranks come from the launcher: DeepSpeed or torchrun (RANK), srun (SLURM_PROCID), mpirun (OMPI_COMM_WORLD_RANK). Without
one there is a single rank.
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from raphael_dist.errors import NotSavedError, UserError
from raphael_dist.model.device import from_host
from raphael_dist.parallel.host_memory import keep_freed_memory

_log = logging.getLogger(__name__)
T = TypeVar("T")
TOLD = (UserError, NotSavedError)  # raised on every rank when it is on one
TIMEOUT = timedelta(minutes=30)  # of every process group

# (launcher, rank, world size, local rank, ranks on this host)
_LAUNCHERS = (
    ("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Ranks:
    """This process among all: global rank, number of ranks, rank on this host, ranks on this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(env: dict[str, str] | None = None) -> Ranks:
    """Read the launcher's variables. Raises UserError when a launcher set some of them but not all, or nonsense."""
    env = dict(os.environ) if env is None else env
    for launcher, rank, world, local, local_world in _LAUNCHERS:
        # An interactive Slurm shell has SLURM_PROCID without being one of several ranks.
        if rank not in env or (launcher == "srun" and "SLURM_STEP_ID" not in env):
            continue
        values = {name: env.get(name, "") for name in (rank, world, local)}
        for name, value in values.items():
            if not value.isdigit():
                raise UserError(f"environment variable {name} is {value!r} under {launcher}; it must be a number")
        world_size = int(values[world])
        here = env.get(local_world, "").split("(")[0]
        return Ranks(
            int(values[rank]), world_size, int(values[local]), int(here) if here.isdigit() else world_size, launcher
        )
    return Ranks()


def initialise(ranks: Ranks, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    # DeepSpeed calls collectives under names that torch 2.13 has renamed; nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
    if ranks.launcher == "mpirun" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _meet_by_mpi()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.launcher == "none":
        os.environ["MASTER_PORT"] = str(free_port())
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", ranks.local_rank)):
        os.environ[name] = str(value)
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{ranks.local_world_size} ranks were started on a host with {torch.cuda.device_count()} GPUs; "
                "start one rank per GPU"
            )
        torch.cuda.set_device(ranks.local_rank)
        device, backend = torch.device("cuda", ranks.local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(num_threads(ranks))
        keep_freed_memory()
    dist.init_process_group(backend, timeout=timeout)
    return device


def own_group(members: list[int], timeout: timedelta = TIMEOUT) -> dist.ProcessGroup:
    """Create the group of these ranks, to which this rank belongs. Only its members take part, and all at once.

    So a division of the world into groups costs a rank one call instead of one per group. Every rank must have made equally
    many groups before, since the members find each other by a name in which that number stands.
    """
    return cast(dist.ProcessGroup, dist.new_group(members, timeout=timeout, use_local_synchronization=True))


def _meet_by_mpi() -> tuple[str, str]:
    """Return the address and port of rank 0, which mpirun does not tell."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "mpirun says nothing of where rank 0 is: install mpi4py, or set MASTER_ADDR and MASTER_PORT (mpirun -x)"
        ) from None
    world = MPI.COMM_WORLD
    return cast(tuple[str, str], world.bcast((socket.gethostname(), str(free_port())) if world.rank == 0 else None))


def num_threads(ranks: Ranks) -> int:
    """Return how many threads a rank on a CPU may use: OMP_NUM_THREADS, or its share of the cores it may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)


def host_name() -> str:
    """Return the name of this host, or of this node as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rank_table(ranks: Ranks, device: torch.device) -> list[str]:
    """Write a line about every rank to the log of rank 0; return their hosts. Collective."""
    table = gather_objects((host_name(), str(device), ranks.local_rank, os.getpid()))
    for rank, (host, name, local_rank, pid) in enumerate(table if ranks.is_main else []):
        _log.info("rank %d: %s, %s, local rank %d, pid %d, started by %s", rank, host, name, local_rank, pid, ranks.launcher)
    return [host for host, *_ in table]


def free_port() -> int:
    """Return a TCP port that is free on this host now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def all_reduce_sum(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of each value over all ranks, float64, on the host: one wait for the device."""
    if isinstance(values, torch.Tensor):
        tensor = values.to(device, torch.float64, copy=True)
    else:
        tensor = from_host(values, device, torch.float64)
    dist.all_reduce(tensor)
    return tensor.cpu()


def gather_objects(value: T) -> list[T]:
    """Return the value of every rank, in order. For small values: they are pickled."""
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def all_or_none(work: Callable[[], T]) -> T:
    """Run `work` on every rank; when it fails on any, raise on all, so that none waits for it.

    A UserError or NotSavedError anywhere is raised everywhere; another exception is raised where it happened, a RuntimeError
    elsewhere. For short work: the ranks that are done wait in a collective (`long_work.together` has no such limit).
    """
    return agree(*attempt(work))


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what `work` returns, and what it raises."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def agree(result: T | None, failure: Exception | None, gather: Callable[[Any], list[Any]] = gather_objects) -> T:
    """Return this rank's result when no rank has a failure; raise as `all_or_none` does otherwise. Collective.

    gather: returns the value of every rank, in order; for ranks that talk by other means than the process group.
    """
    kind = next((k for k in TOLD if isinstance(failure, k)), None)
    problems = gather(None if failure is None else (kind, str(failure)))
    if failure is not None and kind is None:
        raise failure
    for rank, problem in enumerate(problems):
        if problem is not None and problem[0] is not None:
            agreed = problem[0](problem[1])
            agreed.agreed = True
            raise agreed from None
        if problem is not None:
            raise RuntimeError(f"rank {rank} failed: {problem[1]}")
    return cast(T, result)
