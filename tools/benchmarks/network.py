"""`tools/bench.py network`: bytes that a node sends in a step, compared with the planner and with what ranks count.

Nodes are simulated by network namespaces of this machine (tests/lib/netns.py), whose interfaces count bytes and frames. All
trainers train the U-Net of `--config` in float32 on equal random batches. The trainers are ours (in each ZeRO stage and with
sharded experts), PyTorch's DistributedDataParallel, DeepSpeed's own ZeRO-2, and our blocks with DeepSpeed's `MoE` layers.
Needs root.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.simulated_nodes import import_netns, run_ranks
from benchmarks.states import random_batch
from benchmarks.step import with_deepspeed_moe
from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.engine.deepspeed_comm import CountedBackend, deepspeed_comm, import_deepspeed
from raphael_dist.engine.engine import Engine
from raphael_dist.engine.gradient_buckets import bucket_count
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.communication import Cluster, Communication, Scheme, communications
from raphael_dist.planning.memory import persistent_elements
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from raphael_dist.storage.files import replace_bytes

SAMPLES, SIDE, STEPS = 1, 8, 1  # samples of a micro-batch; side of latents; steps measured, after one that is not
OVERLAP_BUCKET = 2**18  # elements, so that a model of 5 M parameters has as many buckets as a large one
SCHEMES: dict[int, Scheme] = {0: "replicated", 1: "reduce_scatter", 2: "reduce_scatter", 3: "zero3"}


@dataclass(frozen=True)
class Case:
    """One measurement: a trainer with its settings, on `nodes` nodes with `per_node` ranks each.

    Attributes:
        who: the trainer: "ours", "DDP", "DeepSpeed" or "DeepSpeed MoE".
        stage, space_ep, time_ep, placement: ZeRO stage and expert parallelism of our trainer.
        accumulation: micro-steps per optimizer step.
        overlap: whether gradients are reduced during the backward pass (`overlap_comm`).
        samples: images of a micro-batch.
    """

    nodes: int
    per_node: int
    who: str = "ours"
    stage: int = 2
    space_ep: int = 1
    time_ep: int = 1
    placement: str = "shard"
    accumulation: int = 1
    overlap: bool = False
    samples: int = SAMPLES

    def config(self, name: str) -> Config:
        """Return the configuration `name` (preset or file) with the settings of this measurement."""
        world = self.nodes * self.per_node
        pixels = SIDE * latent_factor(load_config(name).image.vae)
        overrides = [
            f"train.micro_batch_size={self.samples}",
            f"train.global_batch_size={self.samples * world * self.accumulation}",
            f"parallel.space_ep={self.space_ep}",
            f"parallel.time_ep={self.time_ep}",
            f"parallel.placement=[{self.placement}]",
            f"image.buckets=[[{pixels},{pixels}]]",
        ]
        return load_config(name, overrides)


@dataclass(frozen=True)
class Row:
    """Bytes sent in an optimizer step, by the node that sends most.

    Attributes:
        case: the measurement.
        wire: bytes that the network interface sent, with headers, acknowledgements and TCP retransmissions.
        payload: bytes of data that the other nodes have acknowledged.
        counted: bytes that the node's ranks counted (`comm/*`); 0 for trainers other than ours.
        planned: bytes that the planner predicts; 0 for trainers other than ours.
    """

    case: Case
    wire: float
    payload: float
    counted: float
    planned: float


def cases(topologies: list[tuple[int, int]], everything: bool) -> Iterator[Case]:
    """Yield the measurements: most settings on the first topology and a few on the others.

    `topologies`: (nodes, ranks per node) of each. `everything`: yield all settings on all topologies.
    """
    for number, (nodes, per_node) in enumerate(topologies):
        base = Case(nodes, per_node)
        if everything or number == 0:
            for stage, accumulation in product(range(4), (1, 4)):
                yield replace(base, stage=stage, accumulation=accumulation)
            yield replace(base, overlap=True)
            experts = product((1, 2), ((2, 1), (1, 2), (2, 2)), ("shard", "replicate"), (1, 4))
            for stage, (space, time_), placement, accumulation in experts:
                if everything or (stage == 2 and accumulation == 1):
                    yield replace(
                        base, stage=stage, space_ep=space, time_ep=time_, placement=placement, accumulation=accumulation
                    )
        else:
            yield from (base, replace(base, stage=3), replace(base, space_ep=2, time_ep=2))
        yield from (replace(base, who=who) for who in ("DDP", "DeepSpeed"))
        if nodes * per_node < 8:  # with 8 ranks DeepSpeed 0.19.8 waits for ever in _average_expert_grad_norms
            yield replace(base, who="DeepSpeed MoE")


# ---- code that runs on a rank ------------------------------------------------------------------------------


def measure(config_name: str, todo: list[Case], out: str) -> None:
    """Take all measurements `todo` on this rank, and write its counters to the file OUT-RANK.json. Collective."""
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    results = []
    for case in todo:
        print(time.strftime("%X"), case, flush=True)
        torch.manual_seed(0)
        step, traffic = contender(case, case.config(config_name), ranks, device)
        results.append(_count(step, traffic))
        Path(f"{out}-{ranks.rank}.json").write_text(json.dumps(results))
        del step
    dist.barrier()
    dist.destroy_process_group()


def _count(step: Callable[[], object], traffic: Traffic) -> tuple[float, float, float]:
    """Return the bytes per call of `step`: sent by this node's interface, acknowledged by others, counted by this rank."""
    step()
    traffic.take()
    before = _sent()
    for _ in range(STEPS):
        step()
    after = _sent()
    counted = sum(asdict(traffic.take()).values())
    return (after[0] - before[0]) / STEPS, (after[1] - before[1]) / STEPS, counted / STEPS


def _sent() -> tuple[int, int]:
    """Return the bytes so far that this node's interface has sent, and that other nodes have acknowledged. Collective."""
    dist.barrier()
    time.sleep(0.2)  # until the last acknowledgements have arrived
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0" in line)
    connections = subprocess.run(["ss", "-tniOH"], capture_output=True, text=True, check=True).stdout
    acknowledged = 0
    for connection in connections.splitlines():
        local, peer = (address.rpartition(":")[0] for address in connection.split()[3:5])
        if match := local != peer and re.search(r" bytes_acked:(\d+)", connection):
            acknowledged += int(match[1])
    dist.barrier()
    return int(line.split(":")[1].split()[8]), acknowledged


def contender(case: Case, config: Config, ranks: Ranks, device: torch.device) -> tuple[Callable[[], object], Traffic]:
    """Build the trainer of a measurement. Collective.

    Returns:
        A function that takes an optimizer step, and the counter of the bytes that it sends.
    """
    schedule, batch = NoiseSchedule.create(config.diffusion, device), random_batch(config, case.samples, (SIDE, SIDE))

    def loss(model: Any, config: Config = config) -> Tensor:
        return compute_losses(model, batch, schedule, config, torch.float32).total.sum()

    if case.who == "ours":
        zero = {"stage": case.stage, "overlap_comm": case.overlap}
        if case.overlap:
            zero["reduce_bucket_size"] = OVERLAP_BUCKET
        engine = Engine(config, {"zero_optimization": zero}, BatchPlan.of(config, ranks.world_size), device)

        def step() -> None:
            for _ in range(case.accumulation):
                engine.backward(loss(engine) * engine.plan.loss_scale)
            engine.step(1e-5)

        return step, engine.traffic
    if case.who == "DDP":
        return _ddp_step(nn.parallel.DistributedDataParallel(RaphaelUNet(config)), loss), Traffic()
    return _deepspeed_step(case, config, ranks, loss), Traffic()


def _ddp_step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step


def _deepspeed_step(case: Case, config: Config, ranks: Ranks, loss: Callable[..., Tensor]) -> Callable[[], object]:
    deepspeed, comm = import_deepspeed(), deepspeed_comm()
    if isinstance(comm.cdb, CountedBackend):  # of an engine of ours, which was measured before
        comm.cdb = comm.cdb.backend
    if case.who == "DeepSpeed":
        model, groups = RaphaelUNet(config), None
    else:
        deepspeed.init_distributed(verbose=False)
        model, config = with_deepspeed_moe(config, ranks.world_size)
        groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
    tree = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=1e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)

    def step() -> None:
        engine.backward(loss(engine, config))
        engine.step()

    return step


# ---- code that starts the ranks ----------------------------------------------------------------------------


def planned_bytes(case: Case, config_name: str) -> float:
    """Return the bytes that a node sends in a step as predicted by the planner; 0.0 for trainers other than ours."""
    if case.who != "ours":
        return 0.0
    parts = planned_communication(case, config_name, Cluster(case.nodes * case.per_node, case.per_node, gloo=True))
    return sum(part.network_gb for part in parts) * 1e9 * case.per_node


def planned_communication(case: Case, config_name: str, links: Cluster) -> list[Communication]:
    """Return the planner's prediction of all communication of a step of our trainer. `links`: bandwidth and latency."""
    config, world = case.config(config_name), case.nodes * case.per_node
    plan, reductions = BatchPlan.of(config, world), case.accumulation if case.stage >= 2 else 1
    shapes = parameter_shapes(config)
    # DeepSpeed's default for stage3_param_persistence_threshold equals the planner's constant PERSISTENT.
    scheme, persistent = SCHEMES[case.stage], persistent_elements(shapes)
    parameters, buckets = sum(map(prod, shapes.values())), planned_buckets(case, config_name)
    return communications(config, plan, links, parameters, scheme, reductions, persistent, buckets)


def planned_buckets(case: Case, config_name: str) -> int:
    """Return in how many collectives the planner expects our trainer to reduce gradients: 1 without overlap."""
    elements = sum(map(prod, parameter_shapes(case.config(config_name)).values()))
    return bucket_count(elements, case.nodes * case.per_node, OVERLAP_BUCKET) if case.overlap else 1


def bench_network(config_name: str, topologies: list[tuple[int, int]], everything: bool = False) -> Iterator[Row]:
    """Take all measurements on simulated nodes; yield a row for each.

    Args:
        config_name: preset or file of the model.
        topologies: (nodes, ranks per node) of each.
        everything: whether to measure all settings on all topologies.
    """
    link = import_netns().Link()
    todo = list(cases(topologies, everything))
    for nodes, per_node in topologies:
        here = [case for case in todo if (case.nodes, case.per_node) == (nodes, per_node)]
        with tempfile.TemporaryDirectory() as folder:
            spec, out = Path(folder, "cases.json"), f"{folder}/out"
            spec.write_text(json.dumps([asdict(case) for case in here]))
            run_ranks(["network", "--config", config_name, "--cases", str(spec), out], [link] * nodes, per_node)
            yield from read_rows(here, config_name, out)


def read_rows(measured: list[Case], config_name: str, out: str) -> Iterator[Row]:
    """Yield the results of measurements on the same nodes from the files OUT-RANK.json that `measure` wrote."""
    nodes, per_node = measured[0].nodes, measured[0].per_node
    ranks = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(nodes * per_node)]
    for i, case in enumerate(measured):
        rows = []
        for node in range(nodes):
            own = [rank[i] for rank in ranks[node * per_node : (node + 1) * per_node]]
            (wire, payload, _), counted = own[0], sum(rank[2] for rank in own)
            rows.append(Row(case, wire, payload, counted, planned_bytes(case, config_name)))
        yield max(rows, key=lambda row: row.wire)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="preset or file of the model")
    command.add_argument("--nodes", type=int, nargs="+", default=[2, 4], help="numbers of nodes (default: 2 4)")
    command.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks per node (default: 1 2)")
    command.add_argument("--all", action="store_true", help="measure every combination, in about 15 minutes on two cores")
    command.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    command.add_argument("--cases", nargs=2, help=argparse.SUPPRESS)  # on a rank


def describe(case: Case) -> str:
    """Return the trainer and the settings of a measurement as text for the table."""
    if case.who != "ours":
        return {"DDP": "PyTorch's DDP", "DeepSpeed": "DeepSpeed's ZeRO-2"}.get(case.who, "DeepSpeed's ZeRO-2 and `MoE`")
    experts = f", ep {case.space_ep} and {case.time_ep}, {case.placement}" if case.space_ep * case.time_ep > 1 else ""
    overlap = " overlapped" if case.overlap else ""
    return f"ZeRO-{case.stage}{overlap}{experts}" + (f", {case.accumulation} micro-steps" if case.accumulation > 1 else "")


def run(args: argparse.Namespace) -> None:
    """Print the bytes that a node sends in a step: on its network interface, counted by its ranks, and planned."""
    if args.cases:
        spec, out = args.cases
        return measure(args.config, [Case(**case) for case in json.loads(Path(spec).read_text())], out)
    rows = []
    print(
        "| nodes x ranks | settings | sent with headers, MB | acknowledged data, MB | counted by ranks, MB | planned, MB |\n"
        "|---|---|---|---|---|---|"
    )
    for row in bench_network(args.config, list(product(args.nodes, args.ranks)), args.all):
        rows.append(row)
        shown = " | ".join(f"{b / 1e6:.2f}" if b else "" for b in (row.wire, row.payload, row.counted, row.planned))
        print(f"| {row.case.nodes} x {row.case.per_node} | {describe(row.case)} | {shown} |", flush=True)
        if args.out:
            content = {"command": "tools/bench.py " + " ".join(sys.argv[1:]), "rows": [asdict(row) for row in rows]}
            replace_bytes(args.out, json.dumps(content, indent=1).encode())
    return None
