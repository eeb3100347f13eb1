"""Checks every rank before a training starts: its own device, data and disk, then network and numerics with other ranks.

Each rank writes a report file, `rank-NNNNN.json`: after the checks that need no other rank, and again at the end. If a
node is broken, its report names a problem or is missing, while the reports of other nodes only show that they waited.
`preflight_report.judge` uses this to find the broken node.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from raphael_dist.cluster import host_devices
from raphael_dist.cluster.collective_timing import Collective, timed
from raphael_dist.cluster.expert_parity import expert_parity
from raphael_dist.cluster.preflight_report import RankReport
from raphael_dist.config.schema import Config
from raphael_dist.data.fetch.shard_cache import ShardError, store_of
from raphael_dist.data.shards.open_index import find_shards
from raphael_dist.errors import UserError
from raphael_dist.parallel.async_collectives import ExpertGroup
from raphael_dist.runtime import rendezvous
from raphael_dist.runtime.ranks import Ranks, gather_objects, host_name, initialise, num_threads, own_group
from raphael_dist.storage.files import free_bytes, replace_bytes, write_bytes
from raphael_dist.storage.versions import versions
from raphael_dist.text import counted

# Time limits as (seconds, additional seconds per rank): LIMIT_S of all checks together, JOIN_S of each collective.
LIMIT_S = (55.0, 0.1)
JOIN_S = (30.0, 0.05)
SPARE_S = 3.0  # of LIMIT_S, to write the report
PROBE_BYTES = 8 << 20  # read from a shard, and written where checkpoints go
SMALL_NUMEL, SLOW_S = 16 << 10, 0.1  # float32 values of a first exchange between nodes; seconds that mean a slow link
MAX_ROUNDS = 32  # of exchanges between pairs of nodes; up to 33 nodes every pair is tested


class Probe:
    """The preflight checks on one rank: tests of its device, data, disk and network before a training starts.

    `report` has the result of each check by its name, and in "problems" a dict for each problem: the check (`phase`), what
    is wrong (`what`), and the remedy (`fix`). After a problem in a check with other ranks, "unreachable" lists the ranks
    whose messages do not reach this rank.
    """

    def __init__(self, config: Config, ranks: Ranks, out: Path, *, with_data: bool = True) -> None:
        """Prepare the checks of this rank before a training with the configuration `config`.

        `out`: folder of the report files. `with_data`: whether to read a shard of the training data, too.
        """
        self.config, self.ranks, self.path = config, ranks, report_path(out, ranks.rank)
        self._with_data = with_data
        self.device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.report: RankReport = {"rank": ranks.rank, "node": host_name(), "problems": [], "joined": False}
        self.phase = "start"
        self._began = time.monotonic()

    def run(self) -> bool:
        """Run all checks, write this rank's report file, and return whether there was no problem. Collective.

        At the time limit (55 s + 0.1 s per rank) the process writes the file and exits with code 1.
        """
        timer = threading.Timer(self._limit(LIMIT_S), self._out_of_time)
        timer.daemon = True
        timer.start()
        self._try("device", self._identity)
        if self._with_data:
            self._try("data", self._data)
        self._try("checkpoints", self._disk)
        self._write()
        if self._try("process group", self._join):
            self.report["joined"] = True
            checks: list[tuple[str, Callable[[], object]]] = [
                ("clock", self._clock),
                ("pairs", self._pairs),  # before the collectives, which a slow link makes time out on all nodes
                ("all_reduce", self._all_reduce),
                ("all_to_all", self._all_to_all),
                ("experts", self._experts),
                ("end", dist.barrier),  # rank 0 keeps the store, and must not end before the others
            ]
            for name, check in checks:
                if not self._try(name, check):
                    break  # other ranks may wait in a collective, and further checks would time out
        if any(problem["phase"] == self.phase for problem in self.report["problems"]):
            seconds = self._limit(LIMIT_S) - (time.monotonic() - self._began) - SPARE_S
            self.report["unreachable"] = rendezvous.unreachable(self.ranks.rank, self.ranks.world_size, max(1.0, seconds))
        self.report["seconds"] = time.monotonic() - self._began
        self._write()
        timer.cancel()
        return not self.report["problems"]

    def _try(self, name: str, check: Callable[[], object]) -> bool:
        """Run a check, and store its result or its problem in `report` by `name`; return whether there was no problem."""
        self.phase = name
        try:
            self.report[name] = check()
        except UserError as error:
            self._problem(str(error), "")
        except Exception as error:
            self._problem(f"{name}: {' '.join(str(error).split())[:300]}", "")
        return not any(problem["phase"] == name for problem in self.report["problems"])

    def _problem(self, what: str, fix: str) -> None:
        self.report["problems"].append({"phase": self.phase, "what": what, "fix": fix})

    def _write(self) -> None:
        replace_bytes(self.path, json.dumps(self.report).encode(), durable=False)

    def _out_of_time(self) -> None:
        try:
            self._problem(f"{self.phase}: the test has not finished after {self._limit(LIMIT_S):.0f} s", "")
            self._write()
        finally:
            os._exit(1)

    def _limit(self, of: tuple[float, float]) -> float:
        """Return a time limit in seconds that grows with the number of ranks. `of`: (constant seconds, seconds per rank)."""
        return of[0] + of[1] * self.ranks.world_size

    def _identity(self) -> RankReport:
        cuda = self.device.type == "cuda"
        if not cuda:
            host_devices.check_gpus_are_usable()
        if cuda and self.ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {self.ranks.local_rank} requires a GPU of its own, but this host has "
                f"{counted(torch.cuda.device_count(), 'GPU')}. Start at most one rank per GPU."
            )
        name = torch.cuda.get_device_name(self.device) if cuda else f"cpu ({counted(num_threads(self.ranks), 'thread')})"
        library = {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))} if cuda else {}
        return {
            "name": name,
            "network": host_devices.network(os.environ.get("MASTER_ADDR", "127.0.0.1")),
            "versions": versions() | library,
            "gpu": host_devices.gpu_use(self.device),
        }

    def _data(self) -> dict[str, float]:
        """Read the first PROBE_BYTES (8 MiB) of a shard, a different one on each rank; return {"mb_per_s": MB/s}.

        Without shards it returns {}: training then lists them together with everything else that is missing.
        """
        if not (self.config.data.shards or self.config.data.sources):
            return {}
        names = find_shards(self.config, training=True)
        name, store = names[self.ranks.rank % len(names)], store_of(self.config.data)
        began = time.perf_counter()
        try:
            size = len(store.head(name, PROBE_BYTES))
        except ShardError as error:
            self._problem(str(error), "mount its folder on this node, or make it readable for your user")
            return {}
        return {"mb_per_s": size / 1e6 / max(time.perf_counter() - began, 1e-9)}

    def _disk(self) -> dict[str, float]:
        """Write, sync and read a file in the checkpoint folder, on one rank per node only; return MB/s and free GiB."""
        if self.ranks.local_rank != 0:
            return {}
        folder = self.config.run.dir / "checkpoints"
        path, data = folder / f".probe-{self.ranks.rank}", os.urandom(PROBE_BYTES)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # left by a preflight that was killed
            began = time.perf_counter()
            write_bytes(path, data)
            seconds = time.perf_counter() - began
            same, free = path.read_bytes() == data, free_bytes(folder)
        except OSError as error:
            self._problem(
                f"run.dir: {folder} cannot be used ({error.strerror})",
                "mount it on this node, free space, or make it writable for your user",
            )
            return {}
        finally:
            path.unlink(missing_ok=True)
        if not same:
            self._problem(f"run.dir: {folder} does not return the bytes that were written", "use another file system")
        if free < 1 << 30:
            self._problem(
                f"run.dir: only {free / 2**20:.0f} MiB are free in {folder}", "free some, or choose another run.dir"
            )
        return {"mb_per_s": PROBE_BYTES / 1e6 / max(seconds, 1e-9), "free_gib": free / 2**30}

    def _join(self) -> str:
        initialise(self.ranks, timedelta(seconds=self._limit(JOIN_S)))
        dist.barrier()
        self._nodes: list[str] = gather_objects(self.report["node"])
        return dist.get_backend()

    def _clock(self) -> float:
        """Return by how many seconds this rank's clock is ahead of rank 0's. Collective.

        Ranks leave a barrier at slightly different times. So 3 values are measured, and that nearest to 0 is returned.
        """
        differences = []
        for _ in range(3):
            dist.barrier()
            times = gather_objects(time.time())
            differences.append(times[self.ranks.rank] - times[0])
        return min(differences, key=abs)

    def _all_reduce(self) -> float:
        """Run an all-reduce over all ranks and check its result; return the GB/s that this rank sends (ring algorithm)."""
        return self._collective("all_reduce", "the sum over all ranks is wrong")

    def _all_to_all(self) -> float:
        """Run an all-to-all over all ranks and check its result; return the GB/s that this rank sends."""
        return self._collective("all_to_all", "rows of other ranks are wrong")

    def _collective(self, name: str, wrong: str) -> float:
        world = dist.group.WORLD
        assert world is not None
        collective = Collective(name, world, max(1, self._numel() // self.ranks.world_size), self.device)
        seconds = collective.seconds()
        if not collective.is_right():
            self._problem(f"{name.replace('_', '-')}: {wrong}", "check this node's network and GPU for errors")
        return collective.sent_bytes / 1e9 / seconds

    def _pairs(self) -> dict[str, float]:
        """Exchange data with other nodes in turn (at most MAX_ROUNDS); return GB/s by name of the other node. Collective.

        Only the first rank of each node exchanges data; other ranks return {}. A barrier starts each exchange on all ranks.
        """
        leaders = [rank for rank, node in enumerate(self._nodes) if self._nodes.index(node) == rank]
        speeds: dict[str, float] = {}
        for partners in rounds(leaders)[:MAX_ROUNDS]:
            dist.barrier()
            other = partners.get(self.ranks.rank)
            if other is None:
                continue
            speeds[str(self._nodes[other])] = self._pair_speed(other)
        return speeds

    def _pair_speed(self, other: int) -> float:
        """Exchange data with the rank `other`; return the speed in GB/s.

        64 KiB are exchanged first. If they take more than 0.1 s (SLOW_S), the speed is computed from them. Otherwise it is
        measured with 64 MiB on GPUs, or 4 MiB on CPUs. The fastest of three exchanges counts, because a rank may be delayed.
        """
        small = torch.zeros(SMALL_NUMEL, device=self.device)
        _exchange(small, torch.empty_like(small), other)  # opens the connection
        seconds = self._fastest(partial(_exchange, small, torch.empty_like(small), other))
        sent = torch.full((1,), seconds, device=self.device)
        received = torch.empty_like(sent)
        _exchange(sent, received, other)
        seconds = max(seconds, float(received))  # so that both ranks decide alike
        if seconds > SLOW_S:
            return small.nbytes / 1e9 / seconds
        sent = torch.full((self._numel(),), float(self.ranks.rank), device=self.device)
        received = torch.empty_like(sent)
        seconds = self._fastest(partial(_exchange, sent, received, other))
        if not bool((received == other).all()):
            self._problem(
                f"exchange with {self._nodes[other]}: received bytes are wrong", "check both nodes' network for errors"
            )
        return sent.nbytes / 1e9 / seconds

    def _fastest(self, exchange: Callable[[], object]) -> float:
        return min(timed(exchange, self.device) for _ in range(3))

    def _experts(self) -> dict[str, float]:
        """Compare a Space-MoE layer with sharded experts with the same layer on one rank (`expert_parity`).

        Returns {"ranks": ranks that share the experts, "difference": relative difference}; {} if the experts of the model
        cannot be sharded on this number of ranks.
        """
        c, n = self.config, self.ranks.world_size
        size = c.parallel.space_ep if c.parallel.space_ep > 1 else 2
        if n % size or c.model.space_experts % size or c.model.space_experts == 0:
            return {}
        first = self.ranks.rank // size * size
        group = own_group(list(range(first, first + size)), timedelta(seconds=self._limit(JOIN_S)))
        difference = expert_parity(ExpertGroup(group, size, self.ranks.rank - first), c.model.space_experts, self.device)
        if not difference < 1e-3:
            self._problem(
                f"expert parallelism: the result differs from that of one process by {difference:.0e}",
                "the installed libraries compute wrong results: report their versions as a bug of raphael_dist",
            )
        return {"ranks": size, "difference": difference}

    def _numel(self) -> int:
        return (16 if self.device.type == "cuda" else 1) << 20


def report_path(folder: Path, rank: int) -> Path:
    """Return the path of the report file that the preflight writes for a rank into `folder`: rank-NNNNN.json."""
    return folder / f"rank-{rank:05d}.json"


def rounds(members: list[int]) -> list[dict[int, int]]:
    """Arrange all pairs of members (ranks) in rounds, so that any two members are partners in exactly one round.

    This is the circle method of round-robin tournaments. Returns one dict {member: partner} per round. No member
    has two partners in a round, so all pairs of a round can exchange data at the same time. If the number of members is odd,
    one member has no partner in each round.
    """
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    schedule = []
    for _ in range(len(circle) - 1):
        partners: dict[int, int] = {}
        for a, b in zip(circle[: len(circle) // 2], circle[::-1], strict=False):
            if a is not None and b is not None:
                partners |= {a: b, b: a}
        schedule.append(partners)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return schedule


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> None:
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)])
    for item in work:
        item.wait()
