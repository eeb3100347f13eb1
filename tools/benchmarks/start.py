"""`tools/bench.py start`: time that many ranks need to start training, and for the small collectives of a step and a save.

The ranks have no model.

One process imports everything and forks the ranks, so that hundreds of them fit into the memory of one machine. All ranks
share its cores and communicate by gloo over loopback. On a cluster, the network has more latency and each node has cores for
its own ranks. Therefore the numbers show how the time grows with the number of ranks, and not the time on a cluster.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.config.schema import load_config
from raphael_dist.runtime import long_work
from raphael_dist.runtime.ranks import (
    Ranks,
    all_reduce_sum,
    discover,
    free_port,
    gather_objects,
    initialise,
    own_group,
    raise_on_all_ranks,
    rank_table,
)
from raphael_dist.training import run_dir

TIMEOUT = timedelta(minutes=5)
RANGES = 40  # entries of one rank's file in a manifest, as for raphael-3b on about a thousand ranks


def bench_start(world_size: int, ep: int, repeats: int) -> dict[str, float]:
    """Fork `world_size` ranks; return the seconds that the slowest rank takes for each part of a start of training, by name.

    Parts are e.g. "join the process group" and "claim the run directory". Short parts are measured `repeats` times, and
    their median counts. `ep`: number of ranks over which experts are sharded.
    """
    port, pids = free_port(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            pids = [_fork(rank, world_size, ep, repeats, port, folder) for rank in range(world_size)]
            for rank, pid in enumerate(pids.copy()):
                status = os.waitpid(pid, 0)[1]
                pids.remove(pid)
                if status:
                    raise RuntimeError(f"rank {rank} of {world_size} ended with status {status}")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return dict(json.loads((folder / "times.json").read_text()))


def _fork(rank: int, world_size: int, ep: int, repeats: int, port: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        world = str(world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        times = measure(discover(), ep, repeats, folder)
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(times))
        dist.barrier()
        code = 0
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def measure(ranks: Ranks, ep: int, repeats: int, folder: Path) -> dict[str, float]:
    """Return the seconds of the slowest rank for parts of the start of training, of a step and of a save. Collective.

    The result is a dict from the name of a part, such as "join the process group", to seconds.

    Args:
        ranks: this rank and the number of ranks.
        ep: number of ranks over which experts are sharded.
        repeats: number of measurements of each short part; the median counts.
        folder: the run directory is created in this folder.
    """
    began = time.perf_counter()
    device = initialise(ranks, TIMEOUT)
    dist.barrier()
    seconds = {"join the process group": [time.perf_counter() - began]}
    config = load_config("emoji-tiny", [f"run.dir={folder / 'run'}"])
    entry = {f"master/block.{i}.weight": (i, 10_000) for i in range(RANGES)}
    once: dict[str, Callable[[], Any]] = {
        "claim the run directory": lambda: long_work.run_on_all_ranks(
            "locking", lambda report: run_dir.acquire(config, report) if ranks.is_main else None
        ),
        "expert groups, every rank in every call": lambda: _groups_of_all(ep),
        "expert groups, members only": lambda: _own_groups(ep),
    }
    often: dict[str, Callable[[], Any]] = {
        "raise_on_all_ranks": lambda: raise_on_all_ranks(lambda: None),
        "gather a table row": lambda: rank_table(ranks, device),
        "run_on_all_ranks, no work": lambda: long_work.run_on_all_ranks("nothing", lambda _: None),
        "run_on_rank0": lambda: long_work.run_on_rank0("nothing", lambda _: ["a path"] * 100),
        "step: sum of three numbers": lambda: all_reduce_sum([1.0, 0.0, 0.0], device),
        "save: agree on room": lambda: gather_objects((1, 1, None)),
        "save: exchange what was written": lambda: gather_objects((entry, None)),
    }
    for times, works in ((1, once), (repeats, often)):
        for name, work in works.items():
            seconds[name] = [_timed(work) for _ in range(times)]
    slowest = torch.tensor([sorted(by_world)[len(by_world) // 2] for by_world in seconds.values()], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(seconds, slowest.tolist(), strict=True))


def _timed(work: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _groups_of_all(ep: int) -> None:
    """Create all process groups of expert parallelism by `new_group` on every rank, the usual way, for comparison."""
    world = dist.get_world_size()
    for members in [list(range(first, first + ep)) for first in range(0, world, ep)]:
        dist.new_group(members, timeout=TIMEOUT)
    for members in [list(range(i, world, ep)) for i in range(ep)]:
        dist.new_group(members, timeout=TIMEOUT)


def _own_groups(ep: int) -> None:
    world, me = dist.get_world_size(), dist.get_rank()
    first = me // ep * ep
    own_group(list(range(first, first + ep)))
    own_group(list(range(me % ep, world, ep)))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64], help="numbers of ranks, multiples of --ep")
    command.add_argument("--ep", type=int, default=4, help="number of ranks over which experts are sharded (default 4)")
    command.add_argument("--repeats", type=int, default=5, help="measurements of short parts (default 5)")


def run(args: argparse.Namespace) -> None:
    """Print the milliseconds of each part of the start of training (e.g. joining the process group) by number of ranks."""
    import deepspeed  # noqa: F401  # imported before the fork, so that the ranks need not import it

    torch.set_num_threads(1)
    by_world = {world: bench_start(world, args.ep, args.repeats) for world in args.ranks}
    print(f"{os.cpu_count()} cores, gloo over loopback, ep {args.ep}; milliseconds, the slowest rank's")
    print(f"{'ranks':<42}" + "".join(f"{world:>10}" for world in by_world))
    for name in next(iter(by_world.values())):
        print(f"{name:<42}" + "".join(f"{times[name] * 1e3:>10.1f}" for times in by_world.values()), flush=True)
