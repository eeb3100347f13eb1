"""Measures this machine for a minute and writes its description for the planner.

For each class of operations a small and a large one are timed, forward operations and those of backward passes, one after
the other; their difference is the rate. Last, reference steps are run and reckoned: operations take longer within a step
than alone, by caches and allocations, and each has its time in Python and autograd.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor, nn

from raphael_dist.config import Config, config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.model.objective import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.host_memory import keep_freed_memory
from raphael_dist.planning.cluster import ClusterSpec, load_cluster
from raphael_dist.planning.operations import CLASSES, LiveBytes
from raphael_dist.planning.step import device_times
from raphael_dist.planning.trace import meta_batch, trace

REPEATS, LEAST_S = 5, 0.01  # the fastest of so many runs of at least so long counts
# Small enough for a second, and not one of the presets: they are what the description is held to.
REFERENCE = {
    "model": {
        "channels": [48, 96], "attention": [True, True], "layers_per_block": 1, "head_dim": 24, "norm_groups": 16,
        "text_width": 256, "expert_width": [96, 192], "gate_width": 32, "checkpoint_activations": "none",
    },
    "image": {"buckets": [[16, 16]]},
    "train": {"micro_batch": 8, "global_batch": 8},
}  # fmt: skip


def clock() -> float:
    """Return seconds: of the processor where one thread computes, so that other work on the machine hardly counts."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    """Return the fastest time of a call, in seconds, over runs of several calls."""
    work()
    began, calls = clock(), 0
    while clock() - began < LEAST_S:
        work()
        calls += 1
    best = float("inf")
    for _ in range(REPEATS):
        began = clock()
        for _ in range(calls):
            work()
        best = min(best, (clock() - began) / calls)
    return best


def _operations() -> dict[str, tuple[Callable[[], object], Callable[[], object], float, float]]:
    """Return for each class a small and a large operation, and the large one's FLOPs and bytes."""

    def image(channels: int, side: int) -> Tensor:
        return torch.randn(8, channels, side, side)

    def conv(channels: int, side: int) -> Callable[[], object]:
        x, w = image(channels, side), torch.randn(channels, channels, 3, 3)
        return lambda: nn.functional.conv2d(x, w, padding=1)

    def product(n: int) -> Callable[[], object]:
        a, b = torch.randn(n, n), torch.randn(n, n)
        return lambda: a @ b

    def attention(tokens: int, heads: int) -> Callable[[], object]:
        q = torch.randn(8, heads, tokens, 32)
        return lambda: nn.functional.scaled_dot_product_attention(q, q, q)

    def on(work: Callable[[Tensor], object], n: int) -> Callable[[], object]:
        x = torch.randn(n, 256)
        return lambda: work(x)

    large, small = 8192, 1
    size = 2.0 * large * 256 * 4
    norm = nn.LayerNorm(256)
    return {
        "product": (product(4), product(512), 2 * 512**3, 0),
        "convolution": (conv(4, 4), conv(64, 16), 8 * 2 * 64 * 64 * 9 * 256, 0),
        "attention": (attention(4, 1), attention(256, 3), 4 * 8 * 3 * 256**2 * 32, 0),
        "pointwise": (on(lambda x: x + x, small), on(lambda x: x + x, large), 0, 1.5 * size),
        "transcendental": (on(nn.functional.gelu, small), on(nn.functional.gelu, large), 0, size),
        "norm": (on(norm, small), on(norm, large), 0, size),
        "copy": (on(lambda x: x.clone(), small), on(lambda x: x.clone(), large), 0, size),
    }


def measure_rates() -> dict[str, tuple[float, float | None, float]]:
    """Return (us, TFLOP/s or None, GB/s) of each class, on this machine with torch's threads."""
    found: dict[str, tuple[float, float | None, float]] = {}
    with torch.no_grad():
        timed = {
            name: (seconds_of(small), seconds_of(large), flops, size)
            for name, (small, large, flops, size) in _operations().items()
        }
    least, large, _, size = timed["pointwise"]
    stream = size / max(large - least, 1e-9) / 1e9
    for name in CLASSES:
        least, large, flops, size = timed[name]
        rate = max(large - least, 1e-9)
        found[name] = (least * 1e6, flops / rate / 1e12 if flops else None, stream if flops else size / rate / 1e9)
    return found


def description(
    rates: dict[str, tuple[float, float | None, float]], factor: float, us: float, peak: float, again: float = 1.0
) -> dict[str, Any]:
    """Return the tree of a description of this machine; factor, us: `fit_reference`'s; again: `fit_recomputed`'s."""
    how = f"measured by --calibrate on {datetime.date.today()}, {torch.get_num_threads()} threads"
    base = load_cluster("cpu").model_dump(exclude={"name"})

    def number(value: float, source: str = how) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "source": source}

    tree = {}
    for name, (_, tflops, gb_s) in rates.items():
        tree[name] = {"us": number(us), "gb_s": number(gb_s / factor)}
        if tflops is not None:
            tree[name]["tflops"] = number(tflops / factor)
    tree["other"] = tree["pointwise"]
    base["rates"] = {"float32": tree}
    base["peak_tflops"] = {"float32": number(peak, f"{how}: the largest product")}
    base["memory_gb"] = number(psutil.virtual_memory().total / 1e9, f"{how}: the host's")
    base["per_node"] = number(max(1, (os.cpu_count() or 1) // torch.get_num_threads()), f"{how}: cores over threads")
    base["recomputed"] = number(again)
    base["launch_us"] = number(0.0, "in the times of the operations: a CPU is its own host")
    return base


def reference() -> Config:
    """Return the configuration of the reference step."""
    return config_from_tree(REFERENCE)


def measured_step(config: Config, repeats: int = 4) -> float:
    """Return the seconds of the fastest forward and backward pass of a micro-step, after one that is not counted."""
    from raphael_dist.model.diffusion import NoiseSchedule

    torch.manual_seed(0)
    model, schedule = RaphaelUNet(config), NoiseSchedule.create(config.diffusion)
    batch = random_like(config, model.num_blocks)
    best = float("inf")
    for i in range(repeats + 1):
        model.zero_grad()
        began = clock()
        compute_losses(model, batch, schedule, config, torch.float32).total.sum().backward()
        best = min(best, clock() - began) if i else best
    return best


def measured_peak(config: Config) -> int:
    """Return the most bytes of activations alive in a micro-step, as `LiveBytes` sees it, gradients of weights let go."""
    from raphael_dist.model.diffusion import NoiseSchedule

    model, schedule = RaphaelUNet(config), NoiseSchedule.create(config.diffusion)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = random_like(config, model.num_blocks)
    with LiveBytes() as live:
        compute_losses(model, batch, schedule, config, torch.float32).total.sum().backward()
    return live.peak


def random_like(config: Config, num_blocks: int) -> Any:
    """Return a batch of random numbers in the shapes of training, everything a sample has."""
    draw = torch.Generator().manual_seed(0)

    def made(like: Tensor) -> Tensor:
        if like.dtype == torch.bool:
            return torch.ones(like.shape, dtype=torch.bool)
        if like.dtype == torch.long:
            return torch.zeros(like.shape, dtype=torch.long)
        return torch.rand(like.shape, generator=draw)

    batch = meta_batch(config, config.train.micro_batch, num_blocks)
    values = batch._map(made)
    samples = len(batch.weight)
    values["timestep"] = torch.arange(samples) * config.diffusion.num_timesteps // samples  # each expert its share
    return type(batch)(**values)


def reckoned_step(config: Config, cluster: ClusterSpec) -> float:
    """Return the seconds that the planner gives a micro-step's forward and backward pass."""
    return sum(device_times(trace(config, config.train.micro_batch), cluster, "float32"))


def calibrate(path: Path) -> str:
    """Measure this machine, write its description to `path` and return what was found. Raises UserError."""
    keep_freed_memory()  # as training has it
    rates = measure_rates()
    peak = rates["product"][1] or 0.0
    factor, us = fit_reference(rates, peak)
    again = fit_recomputed(_here(description(rates, factor, us, peak)))
    tree = description(rates, factor, us, peak, again)
    text = f"# {platform.machine()}, {os.cpu_count()} cores, by tools/plan_run.py --calibrate.\n"
    try:
        path.write_text(text + yaml.safe_dump(tree, sort_keys=False, width=120))
    except OSError as error:
        raise UserError(f"--calibrate {path}: cannot be written: {error.strerror}") from None
    lines = [
        f"{name:<15}{'' if t is None else f'{t * 1e3:9.1f} GFLOP/s':>18}{g:9.1f} GB/s" for name, (_, t, g) in rates.items()
    ]
    within = (
        f"within a step: {us:.1f} us an operation, and {factor:.2f} times as long as alone, {again:.2f} times as long again "
        f"where it is recomputed; written to {path}"
    )
    return "\n".join([*lines, within])


def fit_recomputed(cluster: ClusterSpec) -> float:
    """Return how many times longer than in the forward pass operations take that are repeated in the backward pass.

    From the reference step with and without recomputation of its blocks: a small difference of two large times.
    """
    taken, reckoned = _reference_steps("model", "checkpoint_activations", ("none", "blocks"), cluster, repeats=10)
    return max(0.1, (taken[1] - taken[0]) / (reckoned[1] - reckoned[0]))


def fit_reference(rates: dict[str, tuple[float, float | None, float]], peak: float) -> tuple[float, float]:
    """Return how many times longer operations take within a step than alone, and the microseconds of each besides.

    From reference steps of one image and of eight: both have the same operations, and differ in what these do.
    """
    config, alone = reference(), _here(description(rates, 1.0, 0.0, peak))
    taken, reckoned = _reference_steps("train", "micro_batch", (1, config.train.micro_batch), alone)
    factor = max(0.1, (taken[1] - taken[0]) / (reckoned[1] - reckoned[0]))
    launches = trace(config, 1).launches
    return factor, max(0.1, (taken[0] - factor * reckoned[0]) / launches * 1e6)


def _here(tree: dict[str, Any]) -> ClusterSpec:
    return ClusterSpec.model_validate({**tree, "name": "here"})


def _reference_steps(
    section: str, key: str, values: Sequence[Any], cluster: ClusterSpec, repeats: int = 4
) -> tuple[list[float], list[float]]:
    """Return the seconds of reference steps that differ in one setting: as measured, and as the planner has them."""
    taken, reckoned, config = [], [], reference()
    for value in values:
        one = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
        taken.append(measured_step(one, repeats))
        reckoned.append(reckoned_step(one, cluster))
    return taken, reckoned
