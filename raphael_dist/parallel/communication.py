"""What a step spends on communication, reckoned: bytes and seconds of reducing gradients, gathering weights and moving rows.

A model of NCCL's rings, as NCCL itself reckons with it to choose between algorithms (src/graph/tuning.cc): a ring passes
all members of a group in a node and then the next node; there are as many rings side by side as a node has members with a
network card each, so the cards of all members carry the bytes. A call costs its bytes by the narrower of the two links, and
a hop per member, longer between nodes. What is reckoned is a bound from below: no rank is late, no network is shared.

Nothing here was measured; docs/scale.md says what follows from it and what it leaves out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raphael_dist.config import Config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import place, synced

# How weights and their gradients are shared out; which ds_config does which stands in docs/scale.md.
Scheme = Literal["all_reduce", "reduce_scatter", "node_shards", "zero3", "zero3_hpz"]
Behind = Literal["forward", "backward", "nothing"]
BACKWARD_SHARE = 0.73  # of a step's computation: 6.30 of 8.59 TFLOP per image of raphael-3b, recomputation included
REDUCE_BUCKET = 500_000_000  # numbers; DeepSpeed's reduce_bucket_size
PREFETCH_BUCKET = 50_000_000  # numbers; DeepSpeed's stage3_prefetch_bucket_size


@dataclass(frozen=True)
class Cluster:
    """The links of `ranks` GPUs, `per_node` in a node, each with a network card of its own.

    node_gb_s: GB/s that a GPU sends to others of its node: NVLink 4 has 450 by its data sheet, 80% of it assumed.
    net_gb_s: GB/s of a GPU's network card: 50 of 400 Gbit/s, 90% assumed. Where a node has fewer cards, their sum divided by
    the GPUs. node_hop_us, net_hop_us: microseconds of a hop, NCCL's constants for the ring in its simple protocol.
    """

    ranks: int
    per_node: int = 8
    node_gb_s: float = 360.0
    net_gb_s: float = 45.0
    node_hop_us: float = 3.4
    net_hop_us: float = 9.6


@dataclass(frozen=True)
class Part:
    """One kind of communication in a step: seconds, GB through this rank's network card, behind what it may hide."""

    what: str
    seconds: float
    network_gb: float
    behind: Behind


@dataclass(frozen=True)
class StepCost:
    """compute_s: of the step. parts: its communication. exposed_s: how much of it nothing hides."""

    compute_s: float
    parts: tuple[Part, ...]
    exposed_s: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute_s + self.exposed_s

    @property
    def network_gb(self) -> float:
        """GB through a rank's network card."""
        return sum(part.network_gb for part in self.parts)


def step_cost(
    config: Config, plan: BatchPlan, cluster: Cluster, parameters: int, scheme: Scheme, compute_s: float, overlap: bool
) -> StepCost:
    """Reckon a step of a model of `parameters` that computes for `compute_s` seconds.

    overlap: gradients are reduced during the backward pass and weights gathered during the forward pass, as far as the
    scheme and the time allow. ValueError: experts that are spread, with a scheme that has no place for them.
    """
    parts = communication(config, plan, cluster, parameters, scheme)
    hidden = 0.0
    for behind, share in (("forward", 1 - BACKWARD_SHARE), ("backward", BACKWARD_SHARE)):
        wanted = sum(part.seconds for part in parts if part.behind == behind)
        hidden += min(wanted, share * compute_s) if overlap else 0.0
    return StepCost(compute_s, tuple(parts), sum(part.seconds for part in parts) - hidden)


def ring(what: str, behind: Behind, size: float, ranks: int, cluster: Cluster, stride: int = 1, calls: int = 1) -> Part:
    """Reckon one reduce-scatter, or one all-gather, of `size` bytes over `ranks` ranks that are `stride` apart.

    An all-reduce is two of them. `calls`: into how many collectives it is divided.
    """
    if ranks <= 1:
        return Part(what, 0.0, 0.0, behind)
    lanes = min(ranks, max(1, cluster.per_node // stride))  # members in a node, each with its card
    nodes = -(-ranks // lanes)
    sent = size * (ranks - 1) / ranks / 1e9
    network_gb = sent / lanes if nodes > 1 else 0.0
    transfer = max(sent / cluster.node_gb_s if lanes > 1 else 0.0, network_gb / cluster.net_gb_s)
    hops = (ranks - nodes) * cluster.node_hop_us + (nodes - 1) * cluster.net_hop_us
    return Part(what, transfer + calls * hops * 1e-6, network_gb, behind)


def communication(
    config: Config, plan: BatchPlan, cluster: Cluster, parameters: int, scheme: Scheme, reductions: int = 1
) -> list[Part]:
    """Return the communication of a step. reductions: how often gradients are reduced in it, and gathered under ZeRO-3.

    ValueError: experts that are spread, with a scheme that has no place for them.
    """
    parts = _parts(config, plan, cluster, parameters, scheme)
    again = [part for part in parts if part.behind != "nothing"]  # what does not hide is the update's, and the rows of all
    return parts + (reductions - 1) * again


def _parts(config: Config, plan: BatchPlan, cluster: Cluster, parameters: int, scheme: Scheme) -> list[Part]:
    width = 2 if config.train.dtype == "bfloat16" else 4
    sharded = [cost for cost in place(config, plan) if cost.shard]
    if sharded and scheme not in ("all_reduce", "reduce_scatter"):
        raise ValueError(f"{scheme} has no place for spread experts (parallel.space_ep, time_ep > 1)")
    found = _shared_out(scheme, parameters - sum(cost.parameters for cost in sharded), width, cluster.ranks, cluster)
    for ep in sorted({cost.ep for cost in sharded}):
        held = sum(cost.parameters for cost in sharded if cost.ep == ep) // ep
        parts = _shared_out(scheme, held, width, cluster.ranks // ep, cluster, ep)
        found += [Part(f"experts over {ep} ranks: {p.what}", p.seconds, p.network_gb, p.behind) for p in parts]
        rows = (
            sum(c.sharded_bytes - width * synced(c.parameters // ep, cluster.ranks // ep) for c in sharded if c.ep == ep)
            / 1e9
        )
        # Groups that do not fit into nodes straddle two: the slowest of them counts.
        inside = cluster.per_node % ep == 0
        seconds = rows / (cluster.node_gb_s if inside else cluster.net_gb_s)
        found.append(Part(f"rows to and from experts over {ep} ranks", seconds, 0.0 if inside else rows, "nothing"))
    return found


def _shared_out(scheme: Scheme, parameters: int, width: int, ranks: int, cluster: Cluster, stride: int = 1) -> list[Part]:
    """Return what it takes to reduce the gradients of `parameters` over `ranks` ranks and to give each the new weights."""
    size, buckets = float(width * parameters), math.ceil(parameters / REDUCE_BUCKET)
    if scheme in ("all_reduce", "reduce_scatter"):
        passes, calls = (2, 2 * buckets) if scheme == "all_reduce" else (1, 1)
        return [
            ring("reduce gradients", "backward", passes * size, ranks, cluster, stride, calls),
            ring("gather weights", "nothing", size, ranks, cluster, stride),
        ]
    inside = min(cluster.per_node, ranks)
    if scheme == "node_shards":
        nodes = ranks // inside
        return [
            ring("reduce gradients in the node", "backward", size, inside, cluster, calls=buckets),
            ring("reduce shards across nodes", "backward", 2 * size / inside, nodes, cluster, inside, 2 * buckets),
            ring("gather weights in the node", "nothing", size, inside, cluster),
        ]
    calls = math.ceil(parameters / PREFETCH_BUCKET)
    again = inside if scheme == "zero3_hpz" else ranks
    return [
        ring("gather weights, forward", "forward", size, ranks, cluster, calls=calls),
        ring("gather weights, backward", "backward", size, again, cluster, calls=calls),
        ring("reduce gradients", "backward", size, ranks, cluster, calls=buckets),
    ]


def describe(costs: Sequence[tuple[str, StepCost]]) -> list[str]:
    """Return a table of named costs, as lines of Markdown; milliseconds, and GB a step through a rank's card."""
    lines = ["| | GB by the card | communication | exposed | step | communication's share |", "|---|---|---|---|---|---|"]
    for name, cost in costs:
        total = sum(part.seconds for part in cost.parts)
        lines.append(
            f"| {name} | {cost.network_gb:.2f} | {total * 1e3:.0f} ms | {cost.exposed_s * 1e3:.0f} ms | "
            f"{cost.seconds * 1e3:.0f} ms | {cost.exposed_s / cost.seconds:.0%} |"
        )
    return lines
