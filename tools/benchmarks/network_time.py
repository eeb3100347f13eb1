"""`tools/bench.py network-time`: seconds of a step over links of given bandwidth and latency, measured and planned.

Nodes are simulated by network namespaces of this machine (tests/lib/netns.py). The ranks of a node reach each other without
a limit. The prediction is the time of the same step over links without a limit, plus the planner's time of all communication
between nodes. For ZeRO-2 with `overlap_comm`, the prediction assumes that the reduction of all gradient buckets except the
last one overlaps with the backward pass. If the backward pass is shorter than this reduction, the rest is not hidden. With
expert parallelism it assumes that nothing is hidden. The table shows the measured share of the reduction, or of the
exchanges with experts, that was hidden. Requires root.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.network import Case, contender, describe, planned_buckets, planned_communication
from benchmarks.network_data import TCP_SHARE
from benchmarks.simulated_nodes import import_netns, run_ranks
from raphael_dist.planning.communication import Cluster
from raphael_dist.runtime.ranks import discover, initialise
from raphael_dist.storage.files import replace_bytes

BACKWARD = 2 / 3  # share of the backward pass in a step's computation
STEPS = 5  # of which the fastest counts, after one that is not measured


@dataclass(frozen=True)
class Row:
    """Times of a step of one kind over one kind of link.

    Attributes:
        case: nodes and ranks on each, ZeRO stage, overlap, expert parallelism, images of a rank.
        mbit_s, delay_ms: bandwidth of each node's link; one-way latency from node to node.
        alone_s: seconds of a step over links without a limit.
        measured_s, planned_s: seconds of a step over these links, measured and predicted.
        hidden: with overlap, the time that it saves, divided by the planner's time of the reduction. With expert
            parallelism, the part of the planner's time of the exchanges that the step did not take. None: neither.
    """

    case: Case
    mbit_s: float
    delay_ms: float
    alone_s: float
    measured_s: float
    planned_s: float
    hidden: float | None = None


def cases(nodes: int, per_node: int, samples: int, experts: bool) -> list[Case]:
    """Return the kinds of steps to time, with `samples` images per rank.

    They are ZeRO-0, ZeRO-2, ZeRO-2 with overlap, and with `experts` only ZeRO-2 with all experts sharded over two ranks.
    """
    base = Case(nodes, per_node, stage=2, samples=samples)
    if experts:
        return [replace(base, space_ep=2, time_ep=2)]
    return [replace(base, stage=0), base, replace(base, overlap=True)]


def measure(config_name: str, kinds: list[Case], out: str) -> None:
    """Time a step of each of the `kinds` on this rank; rank 0 writes the list of seconds to the file OUT. Collective."""
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    steps: list[Callable[[], object]] = []
    seconds: list[float] = []
    for case in kinds:
        torch.manual_seed(0)
        steps.append(contender(case, case.config(config_name), ranks, device)[0])
    for _ in range(STEPS + 1):  # in turns, because a machine's load changes
        for step in steps:
            dist.barrier()
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    count = len(steps)
    fastest = [min(seconds[count + i :: count]) for i in range(count)]
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(fastest))
    dist.barrier()
    dist.destroy_process_group()


def communication_s(case: Case, config_name: str, mbit_s: float, delay_ms: float) -> tuple[float, float, float]:
    """Return the planner's seconds over links of this bandwidth and latency.

    They are (reducing gradients, sending rows to experts and back, other communication).
    """
    net_gb_s = TCP_SHARE * mbit_s / 8e3 / case.per_node  # the ranks of a node share its link
    links = Cluster(case.nodes * case.per_node, case.per_node, math.inf, net_gb_s, 0.0, 1e3 * delay_ms, gloo=True)
    parts = planned_communication(case, config_name, links)
    reduction = sum(part.seconds for part in parts if part.hidden_by == "backward")
    rows = sum(part.seconds for part in parts if part.name.startswith("rows to"))
    return reduction, rows, sum(part.seconds for part in parts) - reduction - rows


def bench(
    config_name: str,
    nodes: int,
    per_node: int,
    samples: int,
    rates: list[float],
    delays: list[float],
    experts: bool = False,
) -> Iterator[Row]:
    """Time steps over links of each bandwidth and latency; yield a row for each link and each kind of step.

    `rates`: bandwidths in Mbit/s. `delays`: one-way latencies in ms. `samples`: images of a rank in a step.
    `experts`: time steps with sharded experts instead of the others.
    """
    netns = import_netns()
    kinds = cases(nodes, per_node, samples, experts)

    def seconds(link: object) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            words = ["network-time", "--config", config_name, "--samples", str(samples), "--nodes", str(nodes)]
            words += ["--experts"] if experts else []
            run_ranks([*words, "--ranks", str(per_node), "--measure", f"{folder}/out"], [link] * nodes, per_node)
            times: list[float] = json.loads(Path(folder, "out").read_text())
            return times

    alone = seconds(netns.Link(whole=True))
    for delay_ms, mbit_s in product(delays, rates):
        measured = seconds(netns.Link(rate=mbit_s, delay_ms=delay_ms, whole=True))
        for case, base, actual in zip(kinds, alone, measured, strict=True):
            reduction, rows, rest = communication_s(case, config_name, mbit_s, delay_ms)
            hidden = 1 - (actual - base - reduction - rest) / rows if rows else None
            if case.overlap:
                once = communication_s(replace(case, overlap=False), config_name, mbit_s, delay_ms)[0]
                hidden = (measured[kinds.index(replace(case, overlap=False))] - actual) / once
                reduction = max(reduction / planned_buckets(case, config_name), reduction - BACKWARD * base)
            yield Row(case, mbit_s, delay_ms, base, actual, base + reduction + rows + rest, hidden)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument(
        "--config", default=str(Path(__file__).with_name("network.yaml")), help="preset or file of the model"
    )
    command.add_argument("--nodes", type=int, default=2, help="number of nodes (default: 2)")
    command.add_argument("--ranks", type=int, default=1, help="ranks per node (default: 1)")
    command.add_argument("--samples", type=int, default=1, help="images of a rank in a step (default: 1)")
    command.add_argument("--mbit", type=float, nargs="+", default=[50, 200, 1000], help="bandwidths in Mbit/s")
    command.add_argument("--delay", type=float, nargs="+", default=[0, 5, 50], help="one-way latencies in ms")
    command.add_argument("--experts", action="store_true", help="time only steps with experts sharded over two ranks")
    command.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    command.add_argument("--measure", help=argparse.SUPPRESS)  # on a rank


def run(args: argparse.Namespace) -> None:
    """Print the seconds of a step over links of each bandwidth and latency, measured and predicted by the planner."""
    if args.measure:
        measure(args.config, cases(args.nodes, args.ranks, args.samples, args.experts), args.measure)
        return
    rows = []
    print(
        "| Mbit/s | ms each way | step | without a limit, s | measured, s | planned, s | difference | hidden |\n"
        + 8 * "|---"
        + "|"
    )
    for row in bench(args.config, args.nodes, args.ranks, args.samples, args.mbit, args.delay, args.experts):
        rows.append(row)
        times = " | ".join(f"{seconds:.3f}" for seconds in (row.alone_s, row.measured_s, row.planned_s))
        difference = row.measured_s / row.planned_s - 1
        hidden = "" if row.hidden is None else f"{row.hidden:.0%}"
        what = f"{row.mbit_s:g} | {row.delay_ms:g} | {describe(row.case)}"
        print(f"| {what} | {times} | {difference:+.0%} | {hidden} |", flush=True)
    if args.out:
        replace_bytes(args.out, json.dumps([asdict(row) for row in rows], indent=1).encode())
