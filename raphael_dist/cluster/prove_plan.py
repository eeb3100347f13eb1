"""Checks of `prove` that compare a training step of the user's configuration with the planner's predictions."""

import gc
from collections import Counter

import torch

from raphael_dist.cluster.prove_hardware import NEEDS_GPU, take_steps
from raphael_dist.cluster.prove_model import Case, case_config, position_batch
from raphael_dist.cluster.prove_numbers import Trained
from raphael_dist.cluster.prove_results import Problem, Proof, Result
from raphael_dist.config.schema import Config
from raphael_dist.engine.ds_config import read_deepspeed_json, zero_stage
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement, sync_traffic
from raphael_dist.planning.cluster_spec import ClusterSpec, cluster_names, load_cluster
from raphael_dist.planning.search import MICRO_BATCHES, Choice, Search
from raphael_dist.runtime.ranks import gather_objects, host_name
from raphael_dist.text import counted
from raphael_dist.training.throughput import warmup_step

PLAN_TOLERANCE = 0.5  # a planned step that differs more is reported


def plan(proof: Proof) -> Result:
    """Compare a measured training step of the user's configuration with the planner's prediction for it. Collective.

    The planner is `raphael_dist.planning`. The comparison includes the duration and the memory of the step, the size of this
    rank's fp32 weights, and the bytes that this rank sends to experts on other ranks.

    `proof`: this rank, its device and the user's configuration. Returns measurements and problems of this rank.
    """
    world, micro = proof.ranks.world_size, proof.config.train.micro_batch_size
    config = _one_micro_step(proof.config, world, micro)
    tree = read_deepspeed_json(None, config.train.dtype)
    search = Search(config, _cluster(proof), world)
    outcome = search.evaluate(Choice(1, 1, zero_stage(tree), False, micro, config.model.checkpoint_activations, "auto"))
    if outcome is None:
        return Result(not_proven=[f"speed compared with the plan: the planner refuses train.micro_batch_size={micro}"])
    if proof.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(proof.device)
    try:
        measured = take_steps(proof, config, tree)
    except torch.OutOfMemoryError:
        text = f"train.micro_batch_size={micro} does not fit into memory without expert parallelism"
        return Result(problems=[Problem(text, amber=True)], not_proven=["speed and memory compared with the plan"])
    ratio = outcome.step.seconds / measured.seconds
    lines = [
        f"a step of {counted(config.train.global_batch_size, 'image')}: {measured.seconds * 1e3:.1f} ms, "
        f"planned {outcome.step.seconds * 1e3:.1f} ms ({ratio - 1:+.0%}; {search.cluster.name})"
    ]
    master, planned_master = _master_bytes(measured.engine), outcome.memory.states.master
    lines.append(f"fp32 weights of this rank: {master:,} bytes, planned {planned_master:,}")
    problems, missing = [], []
    if master != planned_master:
        text = f"this rank's fp32 weights take {master:,} bytes, but {planned_master:,} were planned"
        problems.append(Problem(text, own=False))
    if proof.device.type == "cpu":
        missing.append("speed compared with the plan: CPUs differ, and the description of a CPU is not calibrated")
    elif not 1 / (1 + PLAN_TOLERANCE) < ratio < 1 + PLAN_TOLERANCE:
        text = f"the predicted time of a step is {ratio:.2f} times the measured time"
        problems.append(Problem(text, own=False, amber=True))
    if proof.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(proof.device)
        lines.append(f"memory: {peak / 1e9:.2f} GB, planned {outcome.memory.total / 1e9:.2f} GB")
    else:
        missing.append("memory of a step: not measured on a CPU. Run python tools/bench.py plan --parts memory")
    if world % 2 == 0:
        sent, planned = _expert_bytes(proof)
        lines.append(f"bytes to other ranks' experts in a micro-step: {sent:,}, planned {planned:,}")
        if sent != planned:
            problems.append(Problem(f"this rank sent {sent:,} bytes to other ranks' experts, but {planned:,} were planned"))
    missing.append("bytes on the network interfaces: not measured. Read the counters of the interfaces")
    return Result(lines, problems, {}, missing)


def _one_micro_step(config: Config, world: int, micro: int) -> Config:
    """Return a copy of `config` without expert parallelism, and with one micro-step per step.

    `world`: number of ranks. `micro`: images of each rank.
    """
    train = config.train.model_copy(update={"micro_batch_size": micro, "global_batch_size": micro * world})
    parallel = config.parallel.model_copy(update={"space_ep": 1, "time_ep": 1})
    return config.model_copy(update={"train": train, "parallel": parallel})


def _cluster(proof: Proof) -> ClusterSpec:
    """Return the planner's description of a cluster with this rank's type of GPU, and as many of them per node as here.

    The description is "cpu" if this rank has no GPU, and "h100x8" if the planner does not know this type of GPU. Collective.
    """
    name = "cpu"
    if proof.device.type == "cuda":
        gpu = torch.cuda.get_device_name(proof.device).lower()
        name = next((n for n in cluster_names() if n.split("x")[0] in gpu), "h100x8")
    return load_cluster(name).with_value("per_node", max(Counter(gather_objects(host_name())).values()))


def _master_bytes(engine: Engine) -> int:
    owners = {id(f.owner): f.owner for f in engine.fragments}
    return sum(4 * owner.numel() for owner in owners.values())


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

    It is a warning if the planner predicts that a larger one fits.

    `proof`: this rank, its device and the user's configuration. Returns a result with one line of text: this micro-batch
    size, and the size that the planner predicts.
    """
    if proof.device.type != "cuda":
        return Result(not_proven=[NEEDS_GPU.format("the largest micro-batch that fits")])
    world, largest = proof.ranks.world_size, 0
    configs = {micro: _one_micro_step(proof.config, world, micro) for micro in MICRO_BATCHES}
    tree = read_deepspeed_json(None, proof.config.train.dtype)
    planned = _planned_micro_batch(Search(proof.config, _cluster(proof), world), configs, zero_stage(tree))
    for micro, config in configs.items():
        proof.mark(f"micro-batch {micro}")
        if not _fits(proof, config, tree):
            break
        largest = micro
    text = f"largest micro-batch that fits: {largest}, planned {planned}"
    return Result([text], [Problem(text, own=False, amber=True)] if planned > largest else [])


def _planned_micro_batch(search: Search, configs: dict[int, Config], stage: int) -> int:
    """Return the largest micro-batch that fits according to the planner; 0 if none does.

    `configs`: the configuration for each micro-batch size. `stage`: ZeRO stage.
    """
    largest = 0
    for micro, config in configs.items():
        search.config = config
        outcome = search.evaluate(Choice(1, 1, stage, False, micro, config.model.checkpoint_activations, "auto"))
        if outcome is not None and outcome.fits:
            largest = micro
    return largest


def _fits(proof: Proof, config: Config, tree: Tree) -> bool:
    """Return whether a training step of `config` fits into the memory of every rank. `tree`: DeepSpeed's configuration."""
    fits = _fits_here(proof, config, tree)
    gc.collect()  # DeepSpeed's engine refers to itself, so its memory is not freed at once
    torch.cuda.empty_cache()
    return all(gather_objects(fits))


def _fits_here(proof: Proof, config: Config, tree: Tree) -> bool:
    batch_plan = BatchPlan.of(config, proof.ranks.world_size)
    try:
        engine = Engine(config, tree, batch_plan, proof.device)
        ema = engine.create_ema()  # noqa: F841 (only its memory is needed)
        batch = position_batch(config, batch_plan.slots(0, proof.ranks.rank, 0), engine.module.num_blocks)
        warmup_step(engine, batch, NoiseSchedule.create(config.diffusion, proof.device))
    except (UserError, torch.OutOfMemoryError):
        return False
    return True
