"""What every rank checks before a job trains: its device, data and disk alone; network and numerics with the others.

Each rank writes its report, `rank-NNNNN.json`, twice: after the checks that it makes alone, and at the end. So a broken node
can be told from those that only waited for it: its report names a problem, or is missing (`preflight_report.judge`).
"""

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from raphael_dist.config import Config
from raphael_dist.data.open_index import find_shards
from raphael_dist.data.shard_store import ShardError, store_of
from raphael_dist.errors import UserError
from raphael_dist.model.moe import SpaceMoE
from raphael_dist.parallel.exchange import ExpertGroup
from raphael_dist.parallel.expert_parallel import STACKED, ParallelSpaceMoE
from raphael_dist.parallel.ranks import Ranks, free_port, gather_objects, host_name, num_threads, own_group
from raphael_dist.storage.files import free_bytes, replace_bytes, write_bytes
from raphael_dist.storage.versions import versions

# Time limits, (seconds, and seconds more per rank): of all checks together; of joining the others, and of each exchange.
LIMIT_S = (55.0, 0.1)
JOIN_S = (30.0, 0.05)
PROBE_BYTES = 8 << 20  # read from a shard, and written where checkpoints go
MAX_ROUNDS = 32  # of exchanges between pairs of nodes; on up to 33 nodes every pair meets


class Probe:
    """The checks of one rank. `report` holds their results by name; its `problems` say what is wrong and what to do."""

    def __init__(self, config: Config, ranks: Ranks, out: Path) -> None:
        self.config, self.ranks, self.path = config, ranks, out / f"rank-{ranks.rank:05d}.json"
        self.device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.report: dict[str, Any] = {"rank": ranks.rank, "node": host_name(), "problems": [], "joined": False}
        self.phase = "start"
        self._began = time.monotonic()

    def run(self) -> bool:
        """Run all checks; return whether this rank found no problem. Ends the process at the time limit."""
        timer = threading.Timer(self._limit(LIMIT_S), self._out_of_time)
        timer.daemon = True
        timer.start()
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
        alone: dict[str, Callable[[], Any]] = {"device": self._identity, "data": self._data, "checkpoints": self._disk}
        together: dict[str, Callable[[], Any]] = {
            "clock": self._clock,
            "all_reduce": self._all_reduce,
            "all_to_all": self._all_to_all,
            "pairs": self._pairs,
            "experts": self._experts,
        }
        for name, check in alone.items():
            self._try(name, check)
        self._write()
        if self._try("process group", self._join):
            self.report["joined"] = True
            for name, check in together.items():
                if not self._try(name, check):
                    break  # the others may be waiting in a collective; what follows would only time out
        self.report["seconds"] = time.monotonic() - self._began
        self._write()
        timer.cancel()
        return not self.report["problems"]

    def _try(self, name: str, check: Callable[[], Any]) -> bool:
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
            self._problem(f"{self.phase}: not done after {self._limit(LIMIT_S):.0f} s", "")
            self._write()
        finally:
            os._exit(1)

    def _limit(self, of: tuple[float, float]) -> float:
        """Return a time limit in seconds, which grows with the number of ranks."""
        return of[0] + of[1] * self.ranks.world_size

    def _identity(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        if cuda and self.ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {self.ranks.local_rank} of {torch.cuda.device_count()} GPUs: start one rank per GPU"
            )
        name = torch.cuda.get_device_name(self.device) if cuda else f"cpu ({num_threads(self.ranks)} threads)"
        library = {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))} if cuda else {}
        return {
            "name": name,
            "network": network(os.environ.get("MASTER_ADDR", "127.0.0.1")),
            "versions": versions() | library,
        }

    def _data(self) -> dict[str, float]:
        """Read the first PROBE_BYTES of a shard, a different one on each rank; return MB/s."""
        names = find_shards(self.config, training=True)
        name, store = names[self.ranks.rank % len(names)], store_of(self.config.data)
        began = time.perf_counter()
        try:
            size = len(store.head(name, PROBE_BYTES))
        except ShardError as error:
            self._problem(str(error), "mount it on this node, or mend its permissions")
            return {}
        return {"mb_per_s": size / 1e6 / max(time.perf_counter() - began, 1e-9)}

    def _disk(self) -> dict[str, float]:
        """Write a file where checkpoints go, sync it, read it back; return MB/s and GiB free. One rank per node does it."""
        if self.ranks.local_rank != 0:
            return {}
        folder = self.config.run.dir / "checkpoints"
        path, data = folder / f".probe-{self.ranks.rank}", os.urandom(PROBE_BYTES)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a preflight that was killed
            began = time.perf_counter()
            write_bytes(path, data)
            seconds = time.perf_counter() - began
            same, free = path.read_bytes() == data, free_bytes(folder)
        except OSError as error:
            self._problem(
                f"run.dir: {folder}: {error.strerror}", "mount it on this node, free space, or mend its permissions"
            )
            return {}
        finally:
            path.unlink(missing_ok=True)
        if not same:
            self._problem(f"run.dir: {folder} gives back other bytes than were written", "use another file system")
        if free < 1 << 30:
            self._problem(
                f"run.dir: only {free / 2**20:.0f} MiB are free in {folder}", "free some, or choose another run.dir"
            )
        return {"mb_per_s": PROBE_BYTES / 1e6 / max(seconds, 1e-9), "free_gib": free / 2**30}

    def _join(self) -> str:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            backend,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            timeout=timedelta(seconds=self._limit(JOIN_S)),
            init_method="env://",
        )
        dist.barrier()
        self._nodes: list[str] = gather_objects(self.report["node"])
        return backend

    def _clock(self) -> float:
        """Return how far this clock is from the first rank's, in seconds: the smallest of three differences."""
        differences = []
        for _ in range(3):
            dist.barrier()
            times = gather_objects(time.time())
            differences.append(times[self.ranks.rank] - times[0])
        return min(differences, key=abs)

    def _all_reduce(self) -> float:
        """Return GB/s of a checked all-reduce over all ranks, counted as a ring's traffic."""
        size, n = self._numel(), self.ranks.world_size
        values = torch.arange(size, device=self.device).remainder(97) * (self.ranks.rank + 1.0)
        expected = torch.arange(size, device=self.device).remainder(97) * (n * (n + 1) / 2)
        dist.all_reduce(values.clone())  # the first one makes the connections
        seconds = self._timed(lambda: dist.all_reduce(values))
        if not torch.allclose(values, expected, rtol=1e-5):
            self._problem("all-reduce: the sum over all ranks is wrong", "look at this node's network and GPU for errors")
        return 2 * (n - 1) / n * values.nbytes / 1e9 / seconds

    def _all_to_all(self) -> float:
        """Return GB/s that this rank sends in a checked all-to-all over all ranks."""
        n = self.ranks.world_size
        each = max(1, self._numel() // n)
        ranks = torch.arange(n, device=self.device, dtype=torch.float32)
        sent = (self.ranks.rank * n + ranks).repeat_interleave(each)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        seconds = self._timed(lambda: dist.all_to_all_single(received, sent))
        if not torch.equal(received, (ranks * n + self.ranks.rank).repeat_interleave(each)):
            self._problem("all-to-all: rows of other ranks arrive wrong", "look at this node's network and GPU for errors")
        return (n - 1) / n * sent.nbytes / 1e9 / seconds

    def _pairs(self) -> dict[str, float]:
        """Exchange data with the other nodes, one after the other; return GB/s by the other node's name.

        Only the first rank of each node takes part; the others wait in the barriers.
        """
        leaders = [rank for rank, node in enumerate(self._nodes) if self._nodes.index(node) == rank]
        speeds: dict[str, float] = {}
        for partners in rounds(leaders)[:MAX_ROUNDS]:
            dist.barrier()
            other = partners.get(self.ranks.rank)
            if other is None:
                continue
            sent = torch.full((self._numel(),), float(self.ranks.rank), device=self.device)
            received = torch.empty_like(sent)
            seconds = self._timed(partial(_exchange, sent, received, other))
            if not bool((received == other).all()):
                self._problem(
                    f"exchange with {self._nodes[other]}: wrong bytes arrive", "look at both nodes' network for errors"
                )
            speeds[str(self._nodes[other])] = sent.nbytes / 1e9 / seconds
        return speeds

    def _experts(self) -> dict[str, float]:
        """Compare space experts spread over a few ranks with the same layer on one; return group size and difference."""
        c, n = self.config, self.ranks.world_size
        size = c.parallel.space_ep if c.parallel.space_ep > 1 else 2
        if n % size or c.model.space_experts % size or c.model.space_experts == 0:
            return {}
        first = self.ranks.rank // size * size
        group = own_group(list(range(first, first + size)), timedelta(seconds=self._limit(JOIN_S)))
        difference = expert_parity(ExpertGroup(group, size, self.ranks.rank - first), c.model.space_experts, self.device)
        if not difference < 1e-3:
            self._problem(
                f"expert parallelism: {difference:.0e} away from one process",
                "this stack computes wrongly: report its versions",
            )
        return {"ranks": size, "difference": difference}

    def _numel(self) -> int:
        return (16 if self.device.type == "cuda" else 1) << 20

    def _timed(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return max(time.perf_counter() - began, 1e-9)


def expert_parity(expert_group: ExpertGroup, num_experts: int, device: torch.device) -> float:
    """Return the largest relative difference between a Space-MoE spread over the group and the same one on a single rank.

    Compared are its output and its gradients, for random inputs that all ranks draw alike. Collective.
    """
    tokens, text, dim = 32, 7, 16
    whole = SpaceMoE(num_experts, dim, 24, "auto", seed=4).to(device)
    draw = torch.Generator().manual_seed(5)
    h_BND = torch.randn(expert_group.size, tokens, dim, generator=draw)
    mask_BNY = (torch.rand(expert_group.size, tokens, text, generator=draw) < 0.3).float()
    chosen_BY = torch.randint(num_experts, (expert_group.size, text), generator=draw)
    weight_BYK = torch.nn.functional.one_hot(chosen_BY, num_experts).float() / text
    grad_BND = torch.randn(expert_group.size, tokens, dim, generator=draw)
    h, mask, weight, grad = (t.to(device) for t in (h_BND, mask_BNY, weight_BYK, grad_BND))
    mine = slice(expert_group.index, expert_group.index + 1)

    expected, _ = whole(h.requires_grad_(), mask, weight)
    stacked = [getattr(whole, name) for name in STACKED]
    expected_grads = torch.autograd.grad(expected, [h, *stacked], grad, allow_unused=True, materialize_grads=True)
    layer = ParallelSpaceMoE(whole, expert_group, "auto")
    own = h[mine].detach().clone().requires_grad_()
    out, _ = layer(own, mask[mine], weight[mine])
    shares = [getattr(layer, name) for name in STACKED]
    grads = torch.autograd.grad(out, [own, *shares], grad[mine], allow_unused=True, materialize_grads=True)
    held = slice(expert_group.index * layer.num_experts, (expert_group.index + 1) * layer.num_experts)
    wanted = [expected[mine], expected_grads[0][mine], *(g[held] for g in expected_grads[1:])]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip([out.detach(), *grads], [w.detach() for w in wanted], strict=True)
    )


def rounds(members: list[int]) -> list[dict[int, int]]:
    """Return rounds in which every two members meet once, each round as {member: partner} (the circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    meetings = []
    for _ in range(len(circle) - 1):
        partners: dict[int, int] = {}
        for a, b in zip(circle[: len(circle) // 2], circle[::-1], strict=False):
            if a is not None and b is not None:
                partners |= {a: b, b: a}
        meetings.append(partners)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return meetings


def network(towards: str) -> str:
    """Return the network interface and the IPv4 address by which this host reaches another, as "eth0 10.0.0.5"."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((towards, 9))  # sends nothing
            address = s.getsockname()[0]
    except OSError as error:
        return f"no way to {towards}: {error.strerror}"
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(address == a.address for a in addresses)]
    return " ".join([*names[:1], address])


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> None:
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)])
    for item in work:
        item.wait()
