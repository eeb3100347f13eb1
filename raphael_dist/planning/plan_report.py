"""Writes the plan of a run (run_plan.py) as text."""

import math
import shlex

import numpy as np

from raphael_dist.config.schema import Config
from raphael_dist.planning.operation_recorder import KINDS, PHASES
from raphael_dist.planning.run_plan import RunPlan, active_parameters
from raphael_dist.planning.search import Choice, Outcome, reasons
from raphael_dist.text import counted


def describe(plan: RunPlan, config_name: str, shown: int = 5) -> str:
    """Return the plan of a run as text: a ranking of choices of settings, and details of the best choice.

    The details are memory, time, cost and the command that starts the run. `config_name`: preset or file of the
    configuration, for the command. `shown`: how many choices the ranking lists.
    """
    search, cluster, train = plan.search, plan.search.cluster, plan.search.config.train
    peak, active = cluster.peak_tflops[train.dtype].value, active_parameters(search.shapes)
    lines = [
        f"{config_name} on {counted(search.world, 'device')} of {cluster.name}, {train.dtype}, "
        f"{counted(train.global_batch_size, 'image')} per step",
        f"parameters: {search.parameters / 1e6:,.1f} M, of which {active / 1e6:,.1f} M process an image token "
        "if one space expert per layer works on it (a token in the regions of several words can use several)",
        "",
        *_choices(plan.ranked[:shown], peak),
        "",
        "where such settings have been run so far (docs/proven.md):",
        *(f"  {o.choice}: {run_so_far(o.choice, cluster.device, search.world, search.config)}" for o in plan.ranked[:shown]),
        "",
        "the first choice compared with others:",
        *(f"  {line}" for line in reasons(plan.best, plan.ranked, cluster.memory_gb.value)),
        "",
        *_memory(plan),
        "",
        *_blocks(plan),
        "",
        *_step(plan, peak),
        "",
        *_cost(plan),
        "",
        "command for the first choice:",
        f"  {command(plan, config_name)}",
        "",
        "Predicted, not measured. Assumed numbers of the cluster (see its description): " + ", ".join(assumed(plan)),
    ]
    return "\n".join(lines)


def _choices(best: list[Outcome], peak: float) -> list[str]:
    lines = ["  images/s  MFU    step      memory    choice"]
    for o in best:
        step = o.step
        fits = "" if o.fits else "  does not fit"
        lines.append(
            f"{step.images_per_s:>10,.0f}  {step.mfu(peak):>5.1%}  {step.seconds * 1e3:>6,.0f} ms "
            f"{o.memory.total / 1e9:>6.1f} GB  {o.choice}{fits}"
        )
    return lines


def run_so_far(choice: Choice, device: str, world: int, config: Config) -> str:
    """Return a phrase that names the hardware on which this project has run with such settings, as in docs/proven.md.

    - One GPU, ZeRO stage 1 to 3, no overlap, bfloat16, AdamW, no Triton kernel, no MegaBlocks: "one H200".
    - CPU, any number of ranks: "CPU ranks".
    - All other plans for GPUs have not run. The phrase states that their numbers were checked on CPU ranks and, for
      several GPUs, that nothing has run there yet.

    `choice`: the planned settings; only ZeRO stage and overlap are used. `device`, `world`: the planned hardware, which is
    "gpu" or "cpu", and the number of devices. `config`: the run's configuration.
    """
    usual = config.train.dtype == "bfloat16" and config.optim.kind == "adamw" and config.model.expert_backend != "megablocks"
    if device == "gpu" and world == 1 and choice.stage > 0 and not choice.overlap and usual and not config.train.kernels:
        return "one H200"
    if device == "cpu":
        return "CPU ranks"
    return "numbers checked on CPU ranks; on several GPUs: nothing yet" if world > 1 else "numbers checked on CPU ranks"


def _memory(plan: RunPlan) -> list[str]:
    kinds, total = plan.best.memory.by_kind(), plan.best.memory.total
    parts = "  ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items())
    return [f"memory per rank, GB: {parts}  total {total / 1e9:.2f} of {plan.search.cluster.memory_gb.value:.0f}"]


def _blocks(plan: RunPlan) -> list[str]:
    """Return a table, as lines, of FLOPs, bytes and launches of one micro-step for each part of the model and each pass."""
    choice = plan.best.choice
    trace = plan.search.get_profile().at(choice.micro_batch_size, choice.recompute)
    lines = [
        f"a micro-step of {counted(choice.micro_batch_size, 'image')}, "
        "by part of the model (forward, backward, recomputed):",
        f"  {'':<17}{'TFLOP':>24}{'GB read and written':>27}{'launches':>21}",
    ]
    for i, kind in enumerate(KINDS):
        if not (trace.kind == i).any():
            continue
        flops = "".join(f"{trace.total(trace.flops, phase, kind) / 1e12:8.3f}" for phase in PHASES)
        size = "".join(f"{trace.total(trace.bytes, phase, kind) / 1e9:9.2f}" for phase in PHASES)
        counts = np.bincount(trace.phase[trace.kind == i], minlength=len(PHASES))
        lines.append(f"  {kind:<17}{flops}{size}" + "".join(f"{n:7d}" for n in counts))
    total = (
        f"{trace.total(trace.flops) / 1e12:.3f} TFLOP, {trace.total(trace.bytes) / 1e9:.1f} GB, {trace.launches:,} launches"
    )
    return [*lines, f"  total {total}"]


def _step(plan: RunPlan, peak: float) -> list[str]:
    step = plan.best.step
    lines = [
        f"a step of {counted(step.images, 'image')} in {counted(plan.best.plan.accumulation, 'micro-step')} takes "
        f"{step.seconds * 1e3:,.1f} ms: "
        f"{step.images_per_s:,.0f} images/s, {step.images_per_s / step.ranks:.1f} per device, MFU {step.mfu(peak):.1%}",
        f"  matrix products {step.products * 1e3:.1f} ms  memory traffic {step.traffic * 1e3:.1f} ms  "
        f"update {step.update * 1e3:.1f} ms  launches slower than the device {step.launches * 1e3:.1f} ms",
        f"  communication {step.communication * 1e3:.1f} ms, of which {step.exposed * 1e3:.1f} ms are not overlapped:",
    ]
    totals: dict[tuple[str, str], tuple[float, float]] = {}
    for part in step.parts:
        seconds, size = totals.get((part.name, part.hidden_by), (0.0, 0.0))
        totals[part.name, part.hidden_by] = seconds + part.seconds, size + part.network_gb
    for (name, hidden_by), (seconds, size) in totals.items():
        overlap = "cannot overlap with computation" if hidden_by == "nothing" else f"can overlap with the {hidden_by} pass"
        lines.append(f"    {name}: {seconds * 1e3:.1f} ms, {size:.2f} GB through a rank's network card, {overlap}")
    return lines


def _cost(plan: RunPlan) -> list[str]:
    s = plan.saves
    return [
        f"{plan.images:,} images take {plan.seconds / 86400:,.1f} days, {plan.gpu_hours:,.0f} device hours, "
        f"{plan.dollars:,.0f} dollars at {plan.price:.2f} an hour",
        f"a checkpoint of {s.bytes / 1e9:.1f} GB: training waits {s.stall_s * 1e3:.0f} ms, it is on disk after "
        f"{s.write_s:.1f} s; a failure every {s.mtbf_s / 3600:,.1f} h: save every {s.interval_s:,.0f} s (Daly), "
        f"checkpoint.every={plan.save_every()}; {s.lost:.2%} of the time is lost to saves, repeated work and restarts",
    ]


def command(plan: RunPlan, config_name: str) -> str:
    """Return the shell command that trains with the best settings of a plan: sbatch for GPUs, torchrun for CPUs.

    `config_name`: preset or file of the configuration.
    """
    per_node, choice = int(plan.search.cluster.per_node.value), plan.best.choice
    settings = [*choice.settings(), f"checkpoint.every={plan.save_every()}"]
    if plan.search.cluster.device == "cpu":
        return (
            f"torchrun --nproc_per_node {plan.search.world} raphael_dist/train.py --config {shlex.quote(config_name)} "
            f"--deepspeed_config {choice.json} {shlex.join(settings)}"
        )
    nodes = math.ceil(plan.search.world / per_node)
    return (
        f"CONFIG={shlex.quote(config_name)} DS_CONFIG={choice.json} sbatch --nodes={nodes} "
        f"--gpus-per-node={min(per_node, plan.search.world)} slurm/train_raphael.sh {shlex.join(settings)}"
    )


def assumed(plan: RunPlan) -> list[str]:
    """Return the numbers of the plan's cluster description that are assumed, i.e. neither published nor measured.

    Each is a string such as "price 2.5" or "rates.norm.gb_s 1500".
    """
    numbers = []
    for name, value in plan.search.cluster.model_dump().items():
        if isinstance(value, dict) and "assumed" in value.get("source", ""):
            numbers.append(f"{name} {value['value']:g}")
    for op_class, rates in plan.search.cluster.rates[plan.search.config.train.dtype].items():
        for name, number in rates.model_dump().items():
            if number and "assumed" in number["source"]:
                numbers.append(f"rates.{op_class}.{name} {number['value']:g}")
    return numbers
