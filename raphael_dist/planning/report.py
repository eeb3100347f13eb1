"""A plan as text."""

import math

import numpy as np

from raphael_dist.planning.plan import RunPlan
from raphael_dist.planning.search import Outcome, reasons
from raphael_dist.planning.trace import KINDS, PHASES


def describe(plan: RunPlan, config_name: str, shown: int = 5) -> str:
    """Return the whole report: the best choices, the first of them in detail, what it costs, and the command to run it."""
    c, world, peak = plan.cluster, plan.search.world, plan.cluster.peak_tflops[plan.config.train.dtype].value
    lines = [
        f"{config_name} on {world} devices of {c.name}, {plan.config.train.dtype}, "
        f"{plan.config.train.global_batch} images a step",
        f"parameters: {plan.parameters / 1e6:,.1f} M, of which an image token meets {plan.active / 1e6:,.1f} M",
        "",
        *_choices(plan.ranked[:shown], peak),
        "",
        "why the first:",
        *(f"  {line}" for line in reasons(plan.best, plan.ranked, c.memory_gb.value)),
        "",
        *_memory(plan),
        "",
        *_blocks(plan),
        "",
        *_step(plan, peak),
        "",
        *_cost(plan),
        "",
        "to run the first:",
        f"  {command(plan, config_name)}",
        "",
        "Reckoned, not measured. Assumed of the cluster (its description says why): " + ", ".join(assumed(plan)),
    ]
    return "\n".join(lines)


def _choices(best: list[Outcome], peak: float) -> list[str]:
    lines = ["  images/s  MFU    step      memory    choice"]
    for o in best:
        step, fits = o.step, "" if o.fits else "  does not fit"
        lines.append(
            f"{step.images_per_s:>10,.0f}  {step.mfu(peak):>5.1%}  {step.seconds * 1e3:>6,.0f} ms "
            f"{o.memory.total / 1e9:>6.1f} GB  {o.choice}{fits}"
        )
    return lines


def _memory(plan: RunPlan) -> list[str]:
    kinds, total = plan.best.memory.by_kind(), plan.best.memory.total
    parts = "  ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items())
    return [f"memory of a rank, GB: {parts}  in all {total / 1e9:.2f} of {plan.cluster.memory_gb.value:.0f}"]


def _blocks(plan: RunPlan) -> list[str]:
    """Return FLOPs, bytes and launches by kind of block, of one micro-step."""
    choice = plan.best.choice
    trace = plan.search.profile.at(choice.micro_batch, choice.recompute)
    lines = [
        f"a micro-step of {choice.micro_batch} images, by kind (forward, backward, recomputed):",
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
    return [*lines, f"  in all {total}"]


def _step(plan: RunPlan, peak: float) -> list[str]:
    step = plan.best.step
    lines = [
        f"a step of {step.images} images in {plan.best.plan.accumulation} micro-steps takes {step.seconds * 1e3:,.1f} ms: "
        f"{step.images_per_s:,.0f} images/s, {step.images_per_s / step.ranks:.1f} a device, MFU {step.mfu(peak):.1%}",
        f"  products {step.products * 1e3:.1f} ms  memory traffic {step.traffic * 1e3:.1f} ms  "
        f"update {step.update * 1e3:.1f} ms  launches not hidden {step.launches * 1e3:.1f} ms",
        f"  communication {step.communication * 1e3:.1f} ms, of which {step.exposed * 1e3:.1f} ms not hidden:",
    ]
    merged: dict[tuple[str, str], tuple[float, float]] = {}
    for part in step.parts:
        seconds, size = merged.get((part.what, part.behind), (0.0, 0.0))
        merged[part.what, part.behind] = seconds + part.seconds, size + part.network_gb
    for (what, behind), (seconds, size) in merged.items():
        hides = "hidden by nothing" if behind == "nothing" else f"may hide behind the {behind} pass"
        lines.append(f"    {what}: {seconds * 1e3:.1f} ms, {size:.2f} GB by a rank's network card, {hides}")
    return lines


def _cost(plan: RunPlan) -> list[str]:
    s = plan.saving
    return [
        f"{plan.images:,} images take {plan.seconds / 86400:,.1f} days, {plan.gpu_hours:,.0f} device hours, "
        f"{plan.dollars:,.0f} dollars at {plan.price:.2f} an hour",
        f"a checkpoint of {s.bytes / 1e9:.1f} GB: training waits {s.stall_s * 1e3:.0f} ms, it is on disk after "
        f"{s.write_s:.1f} s; a failure every {s.mtbf_s / 3600:,.1f} h: save every {s.interval_s:,.0f} s (Daly), "
        f"checkpoint.every={plan.save_every()}; {s.lost:.2%} of the time is lost to saves, repeated work and restarts",
    ]


def command(plan: RunPlan, config_name: str) -> str:
    """Return what runs the best choice on the cluster."""
    per_node, choice = int(plan.cluster.per_node.value), plan.best.choice
    settings = [*choice.settings(), f"checkpoint.every={plan.save_every()}"]
    if plan.cluster.device == "cpu":
        return (
            f"torchrun --nproc_per_node {plan.search.world} raphael_dist/train.py --config {config_name} "
            f"--deepspeed_config {choice.json} {' '.join(settings)}"
        )
    nodes = math.ceil(plan.search.world / per_node)
    return (
        f"CONFIG={config_name} DS_CONFIG={choice.json} sbatch --nodes={nodes} "
        f"--gpus-per-node={min(per_node, plan.search.world)} slurm/train_raphael.sh {' '.join(settings)}"
    )


def assumed(plan: RunPlan) -> list[str]:
    """Return which numbers of the cluster's description are assumed, not published or measured."""
    found = []
    for name, value in plan.cluster.model_dump().items():
        if isinstance(value, dict) and "source" in value and "assumed" in value["source"]:
            found.append(f"{name} {value['value']:g}")
    rates = plan.cluster.rates[plan.config.train.dtype]
    for sort, rate in rates.items():
        for name, number in rate.model_dump().items():
            if number and "assumed" in number["source"]:
                found.append(f"rates.{sort}.{name} {number['value']:g}")
    return found
