"""The rank of this process, the process group, and functions with which ranks decide together."""

import logging
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from raphael_dist.errors import NotSavedError, UserError, describe_error
from raphael_dist.model.device import from_host
from raphael_dist.runtime import rendezvous
from raphael_dist.runtime.host_memory import keep_freed_memory
from raphael_dist.runtime.launcher_env import launcher_of
from raphael_dist.text import counted

_log = logging.getLogger(__name__)
T = TypeVar("T")
SHARED_ERRORS = (UserError, NotSavedError)  # raised on every rank when one rank raises them
TIMEOUT = timedelta(minutes=30)  # of every process group


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of ranks, and the launcher.

    Attributes:
        rank, world_size: its global rank and the number of ranks.
        local_rank, local_world_size: its rank on this host and the number of ranks on this host.
        launcher: name of the launcher that started it, e.g. "torchrun"; "none" without a launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the indices of those of `count` items that this rank works on: `rank`, `rank` + `world_size`, ..."""
        return range(self.rank, count, self.world_size)


def discover(env: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's `Ranks` from the environment variables of the launcher.

    Args:
        env: the environment variables (default: those of this process).

    Raises:
        UserError: some variables are missing or not numbers.
    """
    launcher = launcher_of(env)
    if launcher is None:
        return Ranks()
    rank, world_size, local_rank = (
        _number(env, name, launcher.name) for name in (launcher.rank, launcher.world_size, launcher.local_rank)
    )
    if rank >= world_size:
        raise UserError(
            f"environment variable {launcher.rank}={rank} must be below {launcher.world_size}={world_size}. Give every "
            f"rank its own number from 0 on, or unset {launcher.rank} for a single process."
        )
    local_world_size = env.get(launcher.local_world_size, "").split("(")[0]  # Slurm writes "8(x2)"
    return Ranks(
        rank, world_size, local_rank, int(local_world_size) if local_world_size.isdigit() else world_size, launcher.name
    )


def _number(env: Mapping[str, str], name: str, launcher: str) -> int:
    value = env.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise UserError(
            f"environment variable {name}={value!r} (set by {launcher}) must be a number. Start with torchrun or "
            "deepspeed, or unset RANK and WORLD_SIZE for a single process."
        )
    return int(value)


def initialise(ranks: Ranks, timeout: timedelta = TIMEOUT, heartbeat: Callable[[str], None] | None = None) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    Args:
        ranks: this rank.
        timeout: time limit of collectives, and of each step of connecting.
        heartbeat: called with a description before each step that may take long. None: not called.

    Raises:
        UserError: the address of rank 0 is missing or invalid, or a host has more ranks than GPUs.
        HungError: rank 0 does not answer, or not all ranks have connected within `timeout`.
    """
    # DeepSpeed calls collectives by names that torch 2.13 has renamed. Users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
    complete_environment(ranks)
    device = _choose_device(ranks)
    heartbeat = heartbeat or _no_heartbeat
    heartbeat("looking for the other ranks")
    store = rendezvous.connect(ranks.rank, ranks.world_size, timeout)
    heartbeat("waiting for the other ranks")
    rendezvous.wait_for_all(ranks.rank, ranks.world_size, timeout)
    heartbeat("connecting to the other ranks")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    return device


def _no_heartbeat(text: str) -> None:
    """Do nothing, because no watchdog watches this process."""


def complete_environment(ranks: Ranks) -> None:
    """Set the environment variables that torch and DeepSpeed read (RANK, WORLD_SIZE, MASTER_ADDR, ...) for this process.

    Not every launcher sets them. Raises UserError if mpirun started the ranks and the address of rank 0 is unknown.
    """
    if ranks.launcher == "mpirun" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _master_by_mpi()
    if ranks.local_world_size == ranks.world_size:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.launcher == "none":
        os.environ["MASTER_PORT"] = str(free_port())
    os.environ["RANK"] = str(ranks.rank)
    os.environ["WORLD_SIZE"] = str(ranks.world_size)
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)


def _choose_device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(num_threads(ranks))
        keep_freed_memory()
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        ranks_here, gpus = counted(ranks.local_world_size, "rank"), counted(torch.cuda.device_count(), "GPU")
        raise UserError(
            f"the launcher must start at most one rank per GPU, but it started {ranks_here} on a host with {gpus}. Start "
            "fewer ranks on this host, or make more GPUs visible to them."
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def own_group(members: list[int], timeout: timedelta = TIMEOUT) -> dist.ProcessGroup:
    """Create a process group of `members`, one of which must be this rank. Collective among the members only.

    Each rank makes one call for its own group, instead of one call for every group. Before this call, all ranks must have
    created the same number of groups: the members find each other by the name of the new group, which contains this number.
    """
    return cast(dist.ProcessGroup, dist.new_group(members, timeout=timeout, use_local_synchronization=True))


def _master_by_mpi() -> tuple[str, str]:
    """Return (host name of rank 0, a free port of this host). Rank 0 sends both to all ranks by MPI (mpi4py). Collective.

    mpirun sets no environment variables with address and port. Raises UserError if mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "mpirun requires the environment variables MASTER_ADDR and MASTER_PORT, but they are not set. Set both "
            "(mpirun -x), or install mpi4py."
        ) from None
    world = MPI.COMM_WORLD
    return cast(tuple[str, str], world.bcast((socket.gethostname(), str(free_port())) if world.rank == 0 else None))


def num_threads(ranks: Ranks) -> int:
    """Return how many CPU threads a rank may use: OMP_NUM_THREADS, or its share of the available cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)


def host_name() -> str:
    """Return the name of this host; under Slurm the name of its node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rank_table(ranks: Ranks, device: torch.device) -> list[str]:
    """Log a line about every rank (host, device, process id) on rank 0; return each rank's host name. Collective."""
    table = gather_objects((host_name(), str(device), ranks.local_rank, os.getpid()))
    for rank, (host, name, local_rank, pid) in enumerate(table if ranks.is_main else []):
        _log.info("rank %d: %s, %s, local rank %d, pid %d, started by %s", rank, host, name, local_rank, pid, ranks.launcher)
    return [host for host, *_ in table]


def free_port() -> int:
    """Return a TCP port of this host that is free now.

    The port is usually below the range from which the kernel takes ports for outgoing connections. So no outgoing
    connection takes the port before the caller uses it.
    """
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, first_given) if first_given > 12_000 else [0]
    while True:
        with socket.socket() as s, suppress(OSError):  # in use: the next candidate
            s.bind(("127.0.0.1", secrets.choice(candidates)))
            return int(s.getsockname()[1])


def all_reduce_sum(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of each of n values over all ranks, float64 [n] on the host. Collective; waits for the device once.

    `device`: this rank's device, on which the values are reduced. A tensor may have any shape.
    """
    return all_reduce_on_device(values, device).cpu()


def all_reduce_on_device(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Do as `all_reduce_sum`, but return the sums on `device`: then the host does not wait for a GPU. Collective."""
    if isinstance(values, torch.Tensor):
        tensor = values.to(device, torch.float64, copy=True)
    else:
        tensor = from_host(values, device, torch.float64)
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks. Collective. Values are pickled, so they should be small."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's result. If it fails on any rank, raise an error on all. Collective.

    Use it for short work only, because ranks that have finished wait in a collective. For long work there is
    `long_work.run_on_all_ranks`.

    Raises:
        UserError, NotSavedError: on all ranks, if one rank raises it.
        RuntimeError: on the other ranks, if one rank raises any other exception.
    """
    return raise_if_any_failed(*attempt(work))


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Call `work`; return (result, None), or (None, exception) if it raises an exception."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def raise_if_any_failed(
    result: T | None, failure: Exception | None, gather: Callable[[object], list[Any]] = gather_objects
) -> T:
    """Return `result` if `failure` is None on all ranks; otherwise raise an error on all ranks. Collective.

    Args:
        result: this rank's result.
        failure: this rank's exception, or None.
        gather: function that returns the values of all ranks in order. Pass another one if there is no process group.

    Raises:
        UserError, NotSavedError: on all ranks, if the failure of one rank is of this type.
        RuntimeError: if one rank has another failure. That rank raises the failure itself.
    """
    kind = next((k for k in SHARED_ERRORS if isinstance(failure, k)), None)
    problems = gather(None if failure is None else (kind, str(failure) if kind else describe_error(failure)))
    if failure is not None and kind is None:
        raise failure
    for rank, problem in enumerate(problems):
        if problem is not None and problem[0] is not None:
            error = problem[0](problem[1])
            error.agreed = True
            raise error from None
        if problem is not None:
            raise RuntimeError(f"rank {rank} failed: {problem[1]}")
    return cast(T, result)
