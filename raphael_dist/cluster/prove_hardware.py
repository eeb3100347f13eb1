"""Checks of `prove` that measure speed and memory, and compare a training step with the planner's prediction.

The checks cover collectives between ranks, CUDA graphs, how often the host waits for the GPU, and the largest micro-batch.
"""

import time
import warnings
from dataclasses import dataclass
from statistics import median

import torch

from raphael_dist.cluster.collective_timing import COLLECTIVES, Collective
from raphael_dist.cluster.preflight_report import SLOW_PAIR
from raphael_dist.cluster.prove_model import Case, case_config, position_batch
from raphael_dist.cluster.prove_numbers import Trained
from raphael_dist.cluster.prove_results import Problem, Proof, Result
from raphael_dist.config.schema import Config
from raphael_dist.engine.ds_config import read_deepspeed_json, zero_stage
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement, sync_traffic
from raphael_dist.planning.cluster_spec import ClusterSpec, cluster_names, load_cluster
from raphael_dist.planning.search import MICRO_BATCHES, Choice, Search
from raphael_dist.runtime.ranks import all_reduce_sum, gather_objects, host_name, own_group
from raphael_dist.text import counted
from raphael_dist.training.throughput import warmup_step

SMALL_BYTES, SMALL_REPEATS, LARGE_REPEATS = 4096, 20, 3
WARMUP, MEASURED = 2, 4  # steps
PLAN_TOLERANCE = 0.5  # a planned step that differs more is reported
NEEDS_GPU = "{} requires a GPU"


def links(proof: Proof) -> Result:
    """Measure latency and bandwidth of each collective: over all ranks, inside nodes, and between nodes. Collective.

    Wrong values are a problem. A bandwidth of this rank below 0.3 times the median over all ranks is a warning.

    `proof`: this rank and its device. Returns measurements and problems of this rank.
    """
    hosts = gather_objects(host_name())
    me = proof.ranks.rank
    inside = [rank for rank, host in enumerate(hosts) if host == hosts[me]]
    place = inside.index(me)
    between = [ranks[place] for host in dict.fromkeys(hosts) if len(ranks := _of(hosts, host)) > place]
    large = (256 if proof.device.type == "cuda" else 8) << 20
    measured: dict[str, dict[str, list[float]]] = {}
    problems = []
    for scope, members in (("all ranks", list(range(len(hosts)))), ("inside a node", inside), ("between nodes", between)):
        proof.mark(f"a group of {scope}")
        group = own_group(members)  # every rank must create the same number of groups
        for name in COLLECTIVES if len(members) > 1 else ():
            small = Collective(name, group, max(1, SMALL_BYTES // 4 // len(members)), proof.device)
            whole = Collective(name, group, large // 4 // len(members), proof.device)
            proof.mark(f"{name}, {scope}")
            seconds = small.seconds(SMALL_REPEATS), whole.seconds(LARGE_REPEATS)
            measured.setdefault(scope, {})[name] = [seconds[0] * 1e6, whole.sent_bytes / 1e9 / seconds[1]]
            if not (small.is_right() and whole.is_right()):
                problems.append(Problem(f"{name} ({scope}) returns wrong values on this rank"))
    every = gather_objects(measured)
    lines = []
    for scope, by_name in measured.items():
        for name, (us, gb_s) in by_name.items():
            speeds = [other[scope][name][1] for other in every if scope in other]
            lines.append(f"{scope}: {name.replace('_', '-')} {us:.0f} us, {gb_s:.2f} GB/s per rank")
            if gb_s < SLOW_PAIR * median(speeds):
                text = f"{name} {scope}: {gb_s:.2f} GB/s, other ranks {median(speeds):.2f}; check this rank's links"
                problems.append(Problem(text, amber=True))
    missing = [f"links {scope}: there is one rank" for scope in ("inside a node", "between nodes") if scope not in measured]
    return Result(lines, problems, {"links": measured}, missing)


def _of(hosts: list[str], host: str) -> list[int]:
    return [rank for rank, other in enumerate(hosts) if other == host]


@dataclass
class Measured:
    """The results of some training steps on this rank.

    Attributes:
        engine: the training engine after the steps.
        norms: gradient norm of each step, over all ranks.
        seconds: duration of the fastest step in seconds. The first two steps (WARMUP) are not counted.
    """

    engine: Engine
    norms: list[float]
    seconds: float


def take_steps(proof: Proof, config: Config, tree: Tree, count_waits: list[int] | None = None) -> Measured:
    """Take WARMUP + MEASURED (2 + 4) training steps as the trainer does, always on the same synthetic batch. Collective.

    Args:
        proof: this rank and its device.
        config: model and batch to train with.
        tree: the DeepSpeed configuration.
        count_waits: a list. After each step, the number of times that the host waited for the GPU is appended to it. None:
            waits are not counted.
    """
    world, device = proof.ranks.world_size, proof.device
    plan = BatchPlan.of(config, world)
    engine, schedule = Engine(config, tree, plan, device), NoiseSchedule.create(config.diffusion, device)
    slots = [plan.slots(0, proof.ranks.rank, micro) for micro in range(plan.accumulation)]
    batches = [position_batch(config, micro, engine.module.num_blocks).to(device) for micro in slots]
    result = Measured(engine, [], float("inf"))
    for step in range(WARMUP + MEASURED):
        proof.mark(f"step {step + 1}")
        began = time.perf_counter()
        engine.traffic.take()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if count_waits is not None:
                torch.cuda.set_sync_debug_mode("warn")
            total = torch.zeros((), device=device)
            for batch in batches:
                loss = compute_losses(engine, batch, schedule, config, engine.dtype).total.sum()
                engine.backward(loss * plan.loss_scale)
                total += loss.detach()
            values = torch.stack([total.double(), engine.grad_square()])
            _, square = all_reduce_sum(values, device).tolist()
            engine.update(config.optim.lr, square**0.5)
            if count_waits is not None:
                torch.cuda.set_sync_debug_mode("default")
                count_waits.append(sum("synchroniz" in str(warning.message) for warning in seen))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.norms.append(square**0.5)
        if step >= WARMUP:
            result.seconds = min(result.seconds, time.perf_counter() - began)
    return result


def graphs(proof: Proof) -> Result:
    """Take the same training steps with and without CUDA graphs; compare gradient norms and speed. Collective.

    It is a problem if a gradient norm differs by 1 % or more.

    `proof`: this rank and its device. Returns measurements and problems of this rank.
    """
    if proof.device.type != "cuda":
        return Result(not_proven=[NEEDS_GPU.format("train.cuda_graphs on and off")])
    runs = {}
    for on in (False, True):
        config = case_config(Case("bfloat16", 2, 1), proof.ranks.world_size)
        config = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graphs": on})})
        proof.mark(f"cuda_graphs={on}")
        runs[on] = take_steps(proof, config, {"zero_optimization": {"stage": 2}})
    difference = max(abs(a / b - 1) for a, b in zip(runs[True].norms, runs[False].norms, strict=True))
    problems = []
    if not difference < 1e-2:
        problems.append(
            Problem(f"CUDA graphs change the gradient norm by {difference:.1%}, but at most 1% is allowed", False)
        )
    without, with_graphs = (f"{runs[on].seconds * 1e3:.1f} ms" for on in (False, True))
    line = f"a step of the small model takes {without} without CUDA graphs and {with_graphs} with them"
    return Result([f"{line}; gradient norms agree within {difference:.0e}"], problems)


def waits(proof: Proof) -> Result:
    """Count how often the host waits for the GPU in a training step; more than once is a problem. Collective.

    `proof`: this rank and its device. Returns measurements and problems of this rank.
    """
    if proof.device.type != "cuda":
        return Result(not_proven=[NEEDS_GPU.format("the count of the host's waits")])
    counts: list[int] = []
    config = case_config(Case("bfloat16", 2, 1), proof.ranks.world_size)
    take_steps(proof, config, {"zero_optimization": {"stage": 2}}, counts)
    text = f"the host waits for the GPU {counted(counts[-1], 'time')} in a step"
    return Result([text], [Problem(f"{text}, instead of once", amber=True)] if counts[-1] > 1 else [])


def plan(proof: Proof) -> Result:
    """Compare a measured training step of the user's configuration with the planner's prediction for it. Collective.

    The planner is `raphael_dist.planning`. The comparison includes the duration and the memory of the step, the size of this
    rank's fp32 weights, and the bytes that this rank sends to experts on other ranks.

    `proof`: this rank, its device and the user's configuration. Returns measurements and problems of this rank.
    """
    world = proof.ranks.world_size
    config = _one_micro_step(proof.config, world, proof.config.train.micro_batch_size)
    tree = read_deepspeed_json(None, config.train.dtype)
    if proof.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(proof.device)
    measured = take_steps(proof, config, tree)
    search = Search(config, _cluster(proof), world)
    stage = zero_stage(tree)
    outcome = search.evaluate(
        Choice(1, 1, stage, False, config.train.micro_batch_size, config.model.checkpoint_activations, "auto")
    )
    if outcome is None:
        micro = config.train.micro_batch_size
        return Result(not_proven=[f"speed compared with the plan: the planner refuses train.micro_batch_size={micro}"])
    ratio = outcome.step.seconds / measured.seconds
    lines = [
        f"a step of {counted(config.train.global_batch_size, 'image')}: {measured.seconds * 1e3:.1f} ms, "
        f"planned {outcome.step.seconds * 1e3:.1f} ms ({ratio - 1:+.0%}; {search.cluster.name})"
    ]
    problems, missing = _states_problems(measured.engine, outcome.memory.states.master), []
    if proof.device.type == "cpu":
        missing.append("speed compared with the plan: CPUs differ, and the description of a CPU is not calibrated")
    elif not 1 / (1 + PLAN_TOLERANCE) < ratio < 1 + PLAN_TOLERANCE:
        problems.append(Problem(f"the predicted time of a step is {ratio:.2f} times the measured time", False, amber=True))
    if proof.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(proof.device)
        lines.append(f"memory: {peak / 1e9:.2f} GB, planned {outcome.memory.total / 1e9:.2f} GB")
    else:
        missing.append("memory of a step: not measured on a CPU. Run python tools/bench.py plan --parts memory")
    lines.append(f"fp32 weights of this rank: {outcome.memory.states.master:,} bytes, as planned")
    if world % 2 == 0:
        sent, planned = _expert_bytes(proof)
        lines.append(f"bytes to other ranks' experts in a micro-step: {sent:,}, planned {planned:,}")
        if sent != planned:
            problems.append(Problem(f"this rank sent {sent:,} bytes to other ranks' experts, but {planned:,} were planned"))
    missing.append("bytes on the network interfaces: not measured. Read the counters of the interfaces")
    return Result(lines, problems, {}, missing)


def _one_micro_step(config: Config, world: int, micro: int) -> Config:
    """Return a copy of `config` with one micro-step of `micro` images on each of `world` ranks.

    In the copy, the EMA of the weights and expert parallelism are turned off.
    """
    train = config.train.model_copy(update={"micro_batch_size": micro, "global_batch_size": micro * world})
    ema = config.ema.model_copy(update={"enabled": False})
    parallel = config.parallel.model_copy(update={"space_ep": 1, "time_ep": 1})
    return config.model_copy(update={"train": train, "ema": ema, "parallel": parallel})


def _cluster(proof: Proof) -> ClusterSpec:
    """Return the planner's description of a cluster with this rank's type of GPU.

    Returns the description "cpu" if this rank has no GPU, and "h100x8" if the planner does not know this type of GPU.
    """
    if proof.device.type != "cuda":
        return load_cluster("cpu")
    name = torch.cuda.get_device_name(proof.device).lower()
    return load_cluster(next((n for n in cluster_names() if n.split("x")[0] in name), "h100x8"))


def _states_problems(engine: Engine, planned: int) -> list[Problem]:
    owners = {id(f.owner): f.owner for f in engine.fragments}
    actual = sum(4 * owner.numel() for owner in owners.values())
    return (
        []
        if actual == planned
        else [Problem(f"this rank's fp32 weights take {actual:,} bytes, but {planned:,} were planned", False)]
    )


def _expert_bytes(proof: Proof) -> tuple[int, int]:
    """Return the bytes that this rank sends to experts of other ranks in a micro-step: (measured, predicted). Collective.

    The small model of `prove` is used, with its space experts sharded over 2 ranks. Nothing is recomputed: recomputation
    stops before the last exchange, so it sends less than is predicted.
    """
    world = proof.ranks.world_size
    parallel = {"space_ep": 2, "placement": ["shard"], "dispatch": "all_gather"}
    config = case_config(Case("float32", 1, 1), world, batch=3 * world, micro=3, model={"checkpoint_activations": "none"})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    run = Trained(proof, config, {"stage": 1})
    run.engine.traffic.take()
    run.accumulate(0)
    costs = choose_placement(config, run.plan)  # including the update, which sends the experts' gradients and weights
    planned = sum(cost.sharded_bytes - 4 * sync_traffic(cost.parameters // 2, world // 2) for cost in costs)
    return run.engine.traffic.take().experts, planned


def micro_batch(proof: Proof) -> Result:
    """Find the largest micro-batch of the user's model that fits into GPU memory, by trying. Collective.

    `proof`: this rank, its device and the user's configuration. Returns a result with one line of text: this micro-batch
    size, and the size that the planner predicts.
    """
    if proof.device.type != "cuda":
        return Result(not_proven=[NEEDS_GPU.format("the largest micro-batch that fits")])
    world, largest, planned = proof.ranks.world_size, 0, 0
    search = Search(proof.config, _cluster(proof), world)
    tree = read_deepspeed_json(None, proof.config.train.dtype)
    recompute = proof.config.model.checkpoint_activations
    for micro in MICRO_BATCHES:
        config = _one_micro_step(proof.config, world, micro)
        search.config = config
        outcome = search.evaluate(Choice(1, 1, zero_stage(tree), False, micro, recompute, "auto"))
        planned = micro if outcome is not None and outcome.fits else planned
        proof.mark(f"micro-batch {micro}")
        if not _fits(proof, config, tree):
            break
        largest = micro
    return Result([f"largest micro-batch that fits: {largest}, planned {planned}"], [])


def _fits(proof: Proof, config: Config, tree: Tree) -> bool:
    """Return whether a training step of `config` fits into the memory of every rank. `tree`: DeepSpeed's configuration."""
    batch_plan = BatchPlan.of(config, proof.ranks.world_size)
    try:
        engine = Engine(config, tree, batch_plan, proof.device)
        batch = position_batch(config, batch_plan.slots(0, proof.ranks.rank, 0), engine.module.num_blocks)
        warmup_step(engine, batch, NoiseSchedule.create(config.diffusion, proof.device))
        fits = True
    except (UserError, torch.OutOfMemoryError):
        fits = False
    torch.cuda.empty_cache()
    return all(gather_objects(fits))
