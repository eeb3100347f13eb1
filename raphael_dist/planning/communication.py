"""Predicts the communication of a step: bytes and seconds to reduce gradients, gather weights and send tokens to experts.

The cost model is that of NCCL for its ring algorithm (src/graph/tuning.cc, which chooses between algorithms). A ring passes
through all members of a group on one node and then goes to the next node. There are as many parallel rings as a node has
members with a network card of their own, so all cards carry the bytes. The time of a collective is its bytes divided by the
bandwidth of the slower of the two links (within and between nodes), plus one latency (hop) per member, which is longer
between nodes. The result is a lower bound: it assumes that no rank is late and that the network is not shared.

On gloo, with several ranks per node, reduce-scatters and all-gathers have two stages (`one_pass`). Between nodes it sends a
limited number of bytes per round trip (GLOO_WINDOW, GLOO_SEGMENTS).

Except for GLOO_WINDOW, these predictions are not fitted to measurements. docs/scale.md lists the predictions and what the
cost model leaves out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from raphael_dist.config.schema import Config
from raphael_dist.config.types import bytes_per_element
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement, sync_traffic

# How weights and their gradients are divided over ranks. docs/scale.md lists which ds_config uses which scheme.
Scheme = Literal["replicated", "all_reduce", "reduce_scatter", "node_shards", "zero3", "zero3_hpz"]
# The pass that can hide a communication.
HiddenBy = Literal["forward", "backward", "nothing"]
DEEPSPEED_BUCKET = 500_000_000  # elements; default of DeepSpeed's reduce_bucket_size
PREFETCH_BUCKET = 50_000_000  # elements; default of DeepSpeed's stage3_prefetch_bucket_size
MAX_REUSE_DISTANCE = 1_000_000_000  # elements; default of DeepSpeed's stage3_max_reuse_distance
PERSISTENT = 100_000  # elements; stage3_param_persistence_threshold of ds_configs/zero3.json
# Bytes that gloo sends to another rank per round trip of the network.
GLOO_WINDOW = 2.8e6  # of one TCP connection, measured (docs/network.md): 2/3 of Linux' largest send buffer, 4 MiB
GLOO_SEGMENTS = 2 << 20  # of an all-reduce, which has two segments of 1 MiB in transit (gloo/allreduce.cc)
# Round trips of a layer with sharded experts on gloo, (forward, backward). Space-MoE also exchanges the experts' outputs for
# a token of zeros and, forward, how many rows follow.
GLOO_ROUND_TRIPS = {"space": (4, 3), "time": (2, 2)}


@dataclass(frozen=True)
class Cluster:
    """The network links between `ranks` GPUs, with `per_node` GPUs in a node, each with its own network card.

    Attributes:
        node_gb_s: GB/s from a GPU to others of its node. NVLink 4 has 450 by its data sheet; 80% of it is assumed.
        net_gb_s: GB/s of a GPU's network card: 50 for 400 Gbit/s, of which 90% is assumed. Where a node has fewer cards than
            GPUs: the sum of its cards divided by the GPUs.
        node_hop_us, net_hop_us: latency in microseconds from one GPU to the next in a ring, within a node and between nodes.
            The defaults are NCCL's constants for the ring in its simple protocol.
        gloo: whether gloo is used instead of NCCL.
    """

    ranks: int
    per_node: int = 8
    node_gb_s: float = 360.0
    net_gb_s: float = 45.0
    node_hop_us: float = 3.4
    net_hop_us: float = 9.6
    gloo: bool = False


@dataclass(frozen=True)
class Communication:
    """One kind of communication of a step, e.g. the reduction of the gradients.

    Attributes:
        name: label in tables.
        seconds: predicted time.
        network_gb: GB that pass through the network card of one rank.
        hidden_by: the pass during which it runs and whose computation can overlap with it, "forward" or "backward";
            "nothing": every rank waits for it.
    """

    name: str
    seconds: float
    network_gb: float
    hidden_by: HiddenBy


def hidden_seconds(parts: Iterable[Communication], forward_s: float, backward_s: float) -> float:
    """Return how many seconds of communication run at the same time as computation, so that they cost no extra time.

    Args:
        parts: all communication of a step.
        forward_s: duration of the forward pass, in seconds.
        backward_s: duration of the backward pass, in seconds.
    """
    hidden = 0.0
    for hidden_by, available in (("forward", forward_s), ("backward", backward_s)):
        hidden += min(sum(part.seconds for part in parts if part.hidden_by == hidden_by), available)
    return hidden


def ring(
    name: str, hidden_by: HiddenBy, size: float, ranks: int, cluster: Cluster, stride: int = 1, calls: int = 1
) -> Communication:
    """Predict the time of a reduce-scatter or an all-gather with the ring algorithm. An all-reduce takes twice as long.

    Args:
        name: label in tables.
        hidden_by: the pass with which the communication can overlap, as in `Communication`.
        size: bytes of the whole tensor.
        ranks: members of the ring.
        cluster: the links.
        stride: difference of the rank numbers of two neighbours in the ring.
        calls: number of collectives into which the tensor is divided; each has its own latency.

    Returns:
        The predicted seconds, and the GB through a rank's network card. Both are 0 for one rank.
    """
    if ranks <= 1:
        return Communication(name, 0.0, 0.0, hidden_by)
    lanes = _ranks_in_node(ranks, cluster, stride)  # each with its own network card
    nodes = -(-ranks // lanes)
    sent = size * (ranks - 1) / ranks / 1e9
    network_gb = sent / lanes if nodes > 1 else 0.0
    transfer = max(sent / cluster.node_gb_s if lanes > 1 else 0.0, network_gb / cluster.net_gb_s)
    net_hop_us = cluster.net_hop_us * (2 if cluster.gloo else 1)  # on gloo the receiver requests each message
    latency_us = calls * ((ranks - nodes) * cluster.node_hop_us + (nodes - 1) * net_hop_us)
    if cluster.gloo:
        latency_us = max(latency_us, network_gb * 1e9 / GLOO_SEGMENTS * net_hop_us)
    return Communication(name, transfer + latency_us * 1e-6, network_gb, hidden_by)


def one_pass(
    name: str, hidden_by: HiddenBy, size: float, ranks: int, cluster: Cluster, stride: int = 1, calls: int = 1
) -> Communication:
    """Predict the time of a reduce-scatter or an all-gather. Arguments and result are those of `ring`.

    On gloo, with several nodes and equally many ranks on each, the collective has one stage inside each node and one between
    the ranks of equal index on all nodes (`parallel/gloo_collectives.py`). A stage is one message to each rank. It takes one
    round trip, since the receiver requests it. In all other cases, and with NCCL, the result is that of `ring`.
    """
    lanes = _ranks_in_node(ranks, cluster, stride)
    nodes = ranks // lanes
    if not cluster.gloo or nodes == 1 or ranks % lanes:
        return ring(name, hidden_by, size, ranks, cluster, stride, calls)
    inside_gb = size * (lanes - 1) / lanes / 1e9
    network_gb = size * (nodes - 1) / nodes / lanes / 1e9
    round_trip = 2e-6 * cluster.net_hop_us
    windows = network_gb * 1e9 / (nodes - 1) / GLOO_WINDOW  # of the connection to each other node
    seconds = inside_gb / cluster.node_gb_s + max(network_gb / cluster.net_gb_s, windows * round_trip)
    latency = round_trip + (lanes > 1) * cluster.node_hop_us * 1e-6
    return Communication(name, seconds + calls * latency, network_gb, hidden_by)


def _ranks_in_node(ranks: int, cluster: Cluster, stride: int) -> int:
    """Return how many of `ranks` ranks share a node, if the rank numbers of two neighbours differ by `stride`."""
    return min(ranks, max(1, cluster.per_node // stride))


def gathered_again(parameters: int, recomputes: bool, distance: int = MAX_REUSE_DISTANCE) -> float:
    """Return the share of the weights (0..1) that ZeRO-3 gathers a second time in a micro-step, for the backward pass.

    Args:
        parameters: number of parameters of the model.
        recomputes: whether the backward pass recomputes activations.
        distance: DeepSpeed's stage3_max_reuse_distance, in elements.

    After a module's forward pass DeepSpeed frees its weights, unless they are used again before `distance` elements of other
    weights have been used. Let n be the number of elements in the weights of all later modules. Between the module's forward
    and backward pass, these n elements are used twice: in the forward and in the backward pass of the later modules. (With
    recomputation, they are used three times.) So a module keeps its weights if 2 n (or 3 n) is at most `distance`.
    """
    return max(0.0, 1 - distance / ((3 if recomputes else 2) * parameters))


def communications(
    config: Config,
    plan: BatchPlan,
    cluster: Cluster,
    parameters: int,
    scheme: Scheme,
    reductions: int = 1,
    persistent: int = 0,
    buckets: int = 1,
) -> list[Communication]:
    """Predict all communication of a step: reduce gradients, gather weights, send tokens to experts of other ranks.

    Args:
        config: model, batch and precision.
        plan: how the batch is divided over ranks.
        cluster: the links.
        parameters: number of parameters of the whole model.
        scheme: how weights and gradients are divided over ranks and reduced, e.g. "reduce_scatter" (docs/scale.md).
        reductions: how many times a step reduces gradients (and, under ZeRO-3, gathers weights): 1, or the number of
            micro-steps.
        persistent: total elements of the small parameters (up to 100,000 elements each), which ZeRO-3 gathers only once
            in a step.
        buckets: with "reduce_scatter", number of collectives that reduce the gradients.

    Raises:
        ValueError: `scheme` does not support sharded experts.
    """
    parts = _single_reduction(config, plan, cluster, parameters, scheme, persistent, buckets)
    if cluster.gloo:  # NCCL takes microseconds
        parts.append(ring("sum gradient norms", "nothing", 0.0, cluster.ranks, cluster, calls=2))
    # Communication with "nothing" belongs to the update, or already has the tokens of all micro-steps.
    repeated = [part for part in parts if part.hidden_by != "nothing"]
    return parts + (reductions - 1) * repeated


def _single_reduction(
    config: Config, plan: BatchPlan, cluster: Cluster, parameters: int, scheme: Scheme, persistent: int, buckets: int
) -> list[Communication]:
    width = bytes_per_element(config.train.dtype)
    sharded = [cost for cost in choose_placement(config, plan) if cost.shard]
    if sharded and scheme not in ("all_reduce", "reduce_scatter"):
        raise ValueError(
            f"scheme={scheme} does not support sharded experts (parallel.space_ep or parallel.time_ep above 1). Use the "
            "scheme all_reduce or reduce_scatter."
        )
    if scheme in ("zero3", "zero3_hpz"):
        return _zero3(config, cluster, parameters, persistent, scheme)
    replicated = parameters - sum(cost.parameters for cost in sharded)
    gathers = 2 if config.optim.kind == "muon" else 1  # Muon also gathers its momentum
    parts = _synchronisation(scheme, replicated, width, cluster.ranks, cluster, gathers=gathers, scatters=buckets)
    for ep in sorted({cost.ep for cost in sharded}):
        costs, copies = [cost for cost in sharded if cost.ep == ep], cluster.ranks // ep
        local = sum(cost.parameters for cost in costs) // ep
        for part in _synchronisation(scheme, local, width, copies, cluster, ep, gathers):
            name = f"experts over {ep} ranks: {part.name}"
            parts.append(Communication(name, part.seconds, part.network_gb, part.hidden_by))
        rows_gb = sum(c.sharded_bytes - width * sync_traffic(c.parameters // ep, copies) for c in costs) / 1e9
        # If groups do not fit into nodes, the slowest of them crosses two nodes.
        in_node = cluster.per_node % ep == 0
        seconds = rows_gb / (cluster.node_gb_s if in_node else cluster.net_gb_s)
        if cluster.gloo and not in_node:
            forwards = 1 if config.model.checkpoint_activations == "none" else 2
            trips = sum(c.blocks * (forwards * GLOO_ROUND_TRIPS[c.kind][0] + GLOO_ROUND_TRIPS[c.kind][1]) for c in costs)
            seconds += plan.accumulation * trips * 2e-6 * cluster.net_hop_us
        name = f"rows to and from experts over {ep} ranks"
        parts.append(Communication(name, seconds, 0.0 if in_node else rows_gb, "nothing"))
    return parts


def _synchronisation(
    scheme: Scheme,
    parameters: int,
    width: int,
    ranks: int,
    cluster: Cluster,
    stride: int = 1,
    gathers: int = 1,
    scatters: int = 1,
) -> list[Communication]:
    """Return the communication that reduces the gradients of `parameters` elements over ranks and distributes new weights.

    `width`: bytes per element. `ranks`, `cluster`, `stride`: as in `ring`. `gathers`: number of all-gathers of the weights.
    `scatters`: number of reduce-scatters. `scheme`: any but those of ZeRO-3.
    """
    size, buckets = float(width * parameters), math.ceil(parameters / DEEPSPEED_BUCKET)
    if scheme in ("replicated", "all_reduce", "reduce_scatter"):
        if scheme == "reduce_scatter":
            scatters = 1 if cluster.gloo else scatters  # messages of all buckets are in transit at the same time
            reduce = one_pass("reduce gradients", "backward", size, ranks, cluster, stride, scatters)
        else:
            reduce = ring("reduce gradients", "backward", 2 * size, ranks, cluster, stride, 2 * buckets)
        gather = one_pass("gather weights", "nothing", gathers * size, ranks, cluster, stride, gathers)
        return [reduce] if scheme == "replicated" else [reduce, gather]
    inside = min(cluster.per_node, ranks)
    return [  # node_shards
        ring("reduce gradients in the node", "backward", size, inside, cluster, calls=buckets),
        ring("reduce shards across nodes", "backward", 2 * size / inside, ranks // inside, cluster, inside, 2 * buckets),
        ring("gather weights in the node", "nothing", size, inside, cluster),
    ]


def _zero3(config: Config, cluster: Cluster, parameters: int, persistent: int, scheme: Scheme) -> list[Communication]:
    """Return the communication of a micro-step under ZeRO-3, in which every rank gathers all weights.

    `parameters`: number of parameters of the model. `persistent`: elements of the small ones among them, which are gathered
    only once in a step. `scheme`: "zero3", or "zero3_hpz", which gathers for the backward pass within a node.
    """
    width, ranks = bytes_per_element(config.train.dtype), cluster.ranks
    again = gathered_again(parameters, config.model.checkpoint_activations != "none")
    second_gather = min(cluster.per_node, ranks) if scheme == "zero3_hpz" else ranks
    size, small = float(width * (parameters - persistent)), float(width * persistent)
    calls = math.ceil((parameters - persistent) / PREFETCH_BUCKET)
    buckets = math.ceil(parameters / DEEPSPEED_BUCKET)
    return [
        one_pass("gather weights, forward", "forward", size, ranks, cluster, calls=calls),
        one_pass(
            "gather weights, backward", "backward", again * size, second_gather, cluster, calls=math.ceil(again * calls)
        ),
        one_pass("reduce gradients", "backward", size + small, ranks, cluster, calls=buckets),
        one_pass("gather small weights", "nothing", small, ranks, cluster),
    ]
