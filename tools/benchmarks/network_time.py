"""`tools/bench.py network-time`: seconds of a step over links of given bandwidth and latency, measured and planned.

Nodes are simulated by network namespaces of this machine (tests/lib/netns.py). The ranks of a node reach each other without
a limit. The prediction is the time of the same step over links without a limit, plus the planner's time of all communication
between nodes, since nothing overlaps on CPUs. Needs root.
"""

import argparse
import importlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.network import Case, contender, planned_communication, run_ranks
from raphael_dist.planning.communication import Cluster
from raphael_dist.runtime.ranks import discover, initialise
from raphael_dist.storage.files import replace_bytes

STAGES, STEPS = (0, 2), 3  # ZeRO stages; steps of which the fastest counts, after one that is not measured


@dataclass(frozen=True)
class Row:
    """Times of a step with one ZeRO stage over one kind of link.

    Attributes:
        nodes, per_node, stage: number of nodes and of ranks on each; ZeRO stage.
        mbit_s, delay_ms: bandwidth of each node's link; one-way latency from node to node.
        alone_s: seconds of a step over links without a limit.
        measured_s, planned_s: seconds of a step over these links, measured and predicted.
    """

    nodes: int
    per_node: int
    stage: int
    mbit_s: float
    delay_ms: float
    alone_s: float
    measured_s: float
    planned_s: float


def measure(config_name: str, nodes: int, per_node: int, out: str) -> None:
    """Time a step of each ZeRO stage on this rank; rank 0 writes the seconds by stage to the file OUT. Collective."""
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    seconds = {}
    for stage in STAGES:
        case = Case(nodes, per_node, stage=stage)
        torch.manual_seed(0)
        step, _ = contender(case, case.config(config_name), ranks, device)
        times = []
        for _ in range(STEPS + 1):
            dist.barrier()
            began = time.perf_counter()
            step()
            dist.barrier()
            times.append(time.perf_counter() - began)
        seconds[stage] = min(times[1:])
        del step
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def communication_s(case: Case, config_name: str, mbit_s: float, delay_ms: float) -> float:
    """Return the planner's seconds of all communication between nodes in a step. The ranks of a node share its link."""
    net_gb_s = mbit_s / 8e3 / case.per_node
    links = Cluster(case.nodes * case.per_node, case.per_node, math.inf, net_gb_s, 0.0, 1e3 * delay_ms, gloo=True)
    return sum(part.seconds for part in planned_communication(case, config_name, links))


def bench(config_name: str, nodes: int, per_node: int, rates: list[float], delays: list[float]) -> Iterator[Row]:
    """Time steps over links of each bandwidth (Mbit/s) and one-way latency (ms); yield a row for each and each stage."""
    netns = importlib.import_module("tests.lib.netns")

    def seconds(link: object) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            words = ["network-time", "--config", config_name, "--measure", str(nodes), str(per_node), f"{folder}/out"]
            run_ranks(words, [link] * nodes, per_node)
            times: dict[str, float] = json.loads(Path(folder, "out").read_text())
            return times

    alone = seconds(netns.Link(whole=True))
    for delay_ms, mbit_s in product(delays, rates):
        measured = seconds(netns.Link(rate=mbit_s, delay_ms=delay_ms, whole=True))
        for stage in STAGES:
            base = alone[str(stage)]
            planned = base + communication_s(Case(nodes, per_node, stage=stage), config_name, mbit_s, delay_ms)
            yield Row(nodes, per_node, stage, mbit_s, delay_ms, base, measured[str(stage)], planned)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default=str(Path(__file__).with_name("network.yaml")))
    command.add_argument("--nodes", type=int, default=2)
    command.add_argument("--ranks", type=int, default=1, help="ranks per node (default: 1)")
    command.add_argument("--mbit", type=float, nargs="+", default=[50, 200, 1000], help="bandwidths in Mbit/s")
    command.add_argument("--delay", type=float, nargs="+", default=[0, 5, 50], help="one-way latencies in ms")
    command.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    command.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # on a rank


def run(args: argparse.Namespace) -> None:
    """Print the seconds of a step over links of each bandwidth and latency, measured and predicted by the planner."""
    if args.measure:
        nodes, per_node, out = args.measure
        measure(args.config, int(nodes), int(per_node), out)
        return
    rows = []
    print(
        "| Mbit/s | ms each way | ZeRO | without a limit, s | measured, s | planned, s | difference |\n" + 7 * "|---" + "|"
    )
    for row in bench(args.config, args.nodes, args.ranks, args.mbit, args.delay):
        rows.append(row)
        times = " | ".join(f"{seconds:.3f}" for seconds in (row.alone_s, row.measured_s, row.planned_s))
        difference = row.measured_s / row.planned_s - 1
        print(f"| {row.mbit_s:g} | {row.delay_ms:g} | {row.stage} | {times} | {difference:+.0%} |", flush=True)
    if args.out:
        replace_bytes(args.out, json.dumps([asdict(row) for row in rows], indent=1).encode())
