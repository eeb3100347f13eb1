"""Checks of `prove` that measure speed: collectives between ranks, CUDA graphs, and how often the host waits for the GPU."""

import time
import warnings
from dataclasses import dataclass
from statistics import median

import torch

from raphael_dist.cluster.collective_timing import COLLECTIVES, Collective
from raphael_dist.cluster.preflight_report import SLOW_PAIR
from raphael_dist.cluster.prove_model import Case, case_config, position_batch
from raphael_dist.cluster.prove_results import Problem, Proof, Result
from raphael_dist.config.schema import Config
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import all_reduce_sum, gather_objects, host_name, own_group
from raphael_dist.text import counted

SMALL_BYTES, SMALL_REPEATS, LARGE_REPEATS = 4096, 20, 3
WARMUP, MEASURED = 2, 4  # steps
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
    ema = engine.create_ema()
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
            engine.update(config.optim.lr, square**0.5, ema, step + 1)
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
