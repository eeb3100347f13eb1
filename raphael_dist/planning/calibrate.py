"""Measures the speed of this machine for about a minute and writes it as a cluster description for the planner.

For each class of torch operations (matrix products, convolutions, ...) a small and a large operation are timed, forward and
backward. The difference gives the rate in TFLOP/s or GB/s. Then whole training steps are measured and predicted, because an
operation takes longer within a step than alone (caches, allocations, and the time of Python and autograd).
"""

import datetime
import os
import platform
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor, nn

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.planning.cluster_spec import ClusterSpec, load_cluster
from raphael_dist.planning.meta_batch import meta_batch
from raphael_dist.planning.op_costs import CLASSES, LiveBytes
from raphael_dist.planning.operation_recorder import free_gradient
from raphael_dist.planning.step_time import device_times
from raphael_dist.planning.trace import trace
from raphael_dist.runtime.host_memory import keep_freed_memory
from raphael_dist.text import counted

Tree = dict[str, Any]  # of a YAML file
REPEATS, MIN_SECONDS = 5, 0.01  # the fastest of REPEATS runs of at least MIN_SECONDS counts
# A step of less than a second. It is not a preset: the presets are used to test the finished description.
REFERENCE: dict[str, Tree] = {
    "model": {
        "channels": [48, 96], "attention": [True, True], "layers_per_block": 1, "head_dim": 24, "norm_groups": 16,
        "text_width": 256, "expert_width": [96, 192], "gate_width": 32, "checkpoint_activations": "none",
    },
    "image": {"buckets": [[16, 16]]},
    "train": {"micro_batch_size": 8, "global_batch_size": 8},
}  # fmt: skip
ROWS, WIDTH = 8192, 256  # of the large operations without FLOPs


def clock() -> float:
    """Return the current time in seconds for measuring durations, as little disturbed by other processes as possible.

    With one torch thread it is the processor time of this process, which other work on the machine hardly changes. With
    several threads it is wall-clock time.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of one call of `work`: the mean within the fastest of 5 series of calls."""
    work()
    start, calls = clock(), 0
    while clock() - start < MIN_SECONDS:
        work()
        calls += 1
    return min(timeit.repeat(work, timer=clock, repeat=REPEATS, number=calls)) / calls


@dataclass(frozen=True)
class ClassRate:
    """Measured speed of one class of torch operations, such as convolutions.

    Attributes:
        tflops: TFLOP/s; None for classes that are limited by memory and have no FLOPs.
        gb_s: GB/s at which inputs and outputs are read and written.
    """

    tflops: float | None
    gb_s: float


def _product(n: int) -> Callable[[], object]:
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: a @ b


def _convolution(channels: int, side: int) -> Callable[[], object]:
    x, w = torch.randn(8, channels, side, side), torch.randn(channels, channels, 3, 3)
    return lambda: nn.functional.conv2d(x, w, padding=1)


def _attention(tokens: int, heads: int) -> Callable[[], object]:
    q = torch.randn(8, heads, tokens, 32)
    return lambda: nn.functional.scaled_dot_product_attention(q, q, q)


def _seconds_per_row_difference(work: Callable[[Tensor], object]) -> float:
    """Return by how many seconds `work` is slower for a tensor [ROWS, WIDTH] than for [1, WIDTH]."""
    small, large = torch.randn(1, WIDTH), torch.randn(ROWS, WIDTH)
    small_s = seconds_of(lambda: work(small))
    return max(seconds_of(lambda: work(large)) - small_s, 1e-9)


def measure_rates() -> dict[str, ClassRate]:
    """Measure the speed of each class of torch operations on this machine; return a dict by class, e.g. "convolution"."""
    size = 2.0 * ROWS * WIDTH * 4  # bytes read and written by the large operation
    compute = {
        "product": (_product(4), _product(512), 2 * 512**3),
        "convolution": (_convolution(4, 4), _convolution(64, 16), 8 * 2 * 64 * 64 * 9 * 256),
        "attention": (_attention(4, 1), _attention(256, 3), 4 * 8 * 3 * 256**2 * 32),
    }
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        rates = {
            "pointwise": ClassRate(None, 1.5 * size / _seconds_per_row_difference(lambda x: x + x) / 1e9),
            "transcendental": ClassRate(None, size / _seconds_per_row_difference(nn.functional.gelu) / 1e9),
            "norm": ClassRate(None, size / _seconds_per_row_difference(norm) / 1e9),
            "copy": ClassRate(None, size / _seconds_per_row_difference(torch.clone) / 1e9),
        }
        for name, (small, large, flops) in compute.items():
            small_s = seconds_of(small)
            seconds = max(seconds_of(large) - small_s, 1e-9)
            rates[name] = ClassRate(flops / seconds / 1e12, rates["pointwise"].gb_s)
    return {name: rates[name] for name in CLASSES}


def description(rates: dict[str, ClassRate], factor: float, us: float, recomputed: float = 1.0) -> Tree:
    """Return a cluster description of this machine for the planner, as the tree of a YAML file.

    Args:
        rates: measured speed of each class of operations (e.g. "convolution"), each operation repeated alone.
        factor: how many times longer an operation takes within a training step than alone.
        us: microseconds that every operation takes in addition, however small it is.
        recomputed: how many times longer a forward operation takes when the backward pass runs it again.
    """
    how = f"measured by --calibrate on {datetime.date.today()}, {counted(torch.get_num_threads(), 'thread')}"

    def number(value: float, source: str = how) -> Tree:
        return {"value": float(f"{value:.4g}"), "source": source}

    tree = {}
    for name, rate in rates.items():
        tree[name] = {"us": number(us), "gb_s": number(rate.gb_s / factor)}
        if rate.tflops is not None:
            tree[name]["tflops"] = number(rate.tflops / factor)
    tree["other"] = tree["pointwise"]
    base = load_cluster("cpu").model_dump(exclude={"name"})
    base["rates"] = {"float32": tree}
    base["peak_tflops"] = {"float32": number(rates["product"].tflops or 0.0, f"{how}: the largest product")}
    base["memory_gb"] = number(psutil.virtual_memory().total / 1e9, f"{how}: of the host")
    base["per_node"] = number(max(1, (os.cpu_count() or 1) // torch.get_num_threads()), f"{how}: cores over threads")
    base["recomputed"] = number(recomputed)
    base["launch_us"] = number(0.0, "part of the operations' times: a CPU is its own host")
    return base


def measured_step(config: Config, repeats: int = 4) -> float:
    """Measure the seconds of one micro-step (forward and backward pass) on the CPU: the fastest of `repeats` runs."""
    torch.manual_seed(0)
    model, schedule = RaphaelUNet(config), NoiseSchedule.create(config.diffusion)
    batch = random_batch(config, model.num_blocks)

    def step() -> None:
        compute_losses(model, batch, schedule, config, torch.float32).total.sum().backward()

    seconds = timeit.repeat(step, setup=model.zero_grad, timer=clock, repeat=repeats + 1, number=1)
    return min(seconds[1:])  # the first step is slower


def measured_peak(config: Config) -> int:
    """Measure the largest number of bytes of activations that exist at the same time in a micro-step on the CPU.

    Gradients of weights are freed at once, so they do not count.
    """
    model, schedule = RaphaelUNet(config), NoiseSchedule.create(config.diffusion)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(free_gradient)
    batch = random_batch(config, model.num_blocks)
    with LiveBytes() as live:
        compute_losses(model, batch, schedule, config, torch.float32).total.sum().backward()
    return live.peak


def random_batch(config: Config, num_blocks: int) -> Batch:
    """Return a micro-batch of random numbers with the shapes of a training batch of `config`, on the CPU.

    `num_blocks`: number of transformer blocks of the model; each has its own gate noise.
    """
    draw = torch.Generator().manual_seed(0)

    def fill(like: Tensor) -> Tensor:
        if like.dtype == torch.bool:
            return torch.ones(like.shape, dtype=torch.bool)
        if like.dtype == torch.long:
            return torch.zeros(like.shape, dtype=torch.long)
        return torch.rand(like.shape, generator=draw)

    samples = config.train.micro_batch_size
    batch = meta_batch(config, samples, num_blocks).map_tensors(fill)
    batch.timestep = torch.arange(samples) * config.diffusion.num_timesteps // samples  # an equal share for each time expert
    return batch


def predicted_step(config: Config, cluster: ClusterSpec) -> float:
    """Return the predicted seconds of one micro-step (forward and backward pass) in float32 on a device of `cluster`."""
    return sum(device_times(trace(config, config.train.micro_batch_size), cluster, "float32"))


def calibrate(path: Path) -> str:
    """Measure the speed of this machine, write its cluster description (YAML) to `path`, and return a report for the user.

    Raises:
        UserError: the file cannot be written.
    """
    keep_freed_memory()  # as in training
    rates = measure_rates()
    factor, us = fit_reference(rates)
    recomputed = fit_recomputed(_this_machine(description(rates, factor, us)))
    tree = description(rates, factor, us, recomputed)
    text = f"# {platform.machine()}, {os.cpu_count()} cores, by tools/plan_run.py --calibrate.\n"
    try:
        path.write_text(text + yaml.safe_dump(tree, sort_keys=False, width=120))
    except OSError as error:
        raise UserError(f"--calibrate {path} cannot be written: {error.strerror}. Choose another path.") from None
    lines = []
    for name, rate in rates.items():
        flops = "" if rate.tflops is None else f"{rate.tflops * 1e3:9.1f} GFLOP/s"
        lines.append(f"{name:<15}{flops:>18}{rate.gb_s:9.1f} GB/s")
    lines.append(
        f"within a step, an operation takes {us:.1f} us plus {factor:.2f} times its time alone; when recomputed, "
        f"{recomputed:.2f} times as long. Written to {path}"
    )
    return "\n".join(lines)


def fit_recomputed(cluster: ClusterSpec) -> float:
    """Return how many times longer a forward operation takes when the backward pass runs it again.

    Training steps with and without recomputation of the transformer blocks are measured and predicted. The factor is the
    measured difference of their times divided by the predicted difference. Both differences are small compared with the
    times, so the factor is not precise.

    `cluster`: description of this machine for the predictions; its own number `recomputed` is 1.
    """
    steps = []
    for recompute in ("none", "blocks"):
        steps.append(_reference_step("model", {"checkpoint_activations": recompute}, cluster, repeats=10))
    return _ratio_of_differences(steps[0], steps[1])


def fit_reference(rates: dict[str, ClassRate]) -> tuple[float, float]:
    """Compute how much longer operations take within a training step than alone, from measured training steps.

    Steps with one image and with eight images are measured. Both run the same operations, with different sizes.

    Args:
        rates: measured speed of each class of operations (e.g. "convolution"), each operation repeated alone.

    Returns:
        How many times longer operations take within a step than alone; and the microseconds that every operation takes in
        addition, however small it is.
    """
    config, alone = config_from_tree(REFERENCE), _this_machine(description(rates, 1.0, 0.0))
    single_image, all_images = (
        _reference_step("train", {"micro_batch_size": samples}, alone, repeats=4)
        for samples in (1, config.train.micro_batch_size)
    )
    factor = _ratio_of_differences(single_image, all_images)
    measured, predicted = single_image
    return factor, max(0.1, (measured - factor * predicted) / trace(config, 1).launches * 1e6)


def _ratio_of_differences(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return (measured difference) / (predicted difference) of two steps, each given as (measured, predicted) seconds."""
    return max(0.1, (second[0] - first[0]) / (second[1] - first[1]))


def _this_machine(tree: Tree) -> ClusterSpec:
    return ClusterSpec.model_validate({**tree, "name": "here"})


def _reference_step(section: str, values: Tree, cluster: ClusterSpec, repeats: int) -> tuple[float, float]:
    """Return (measured, predicted) seconds of a micro-step of the configuration REFERENCE with some settings changed.

    Args:
        section: the section of the changed settings, e.g. "train".
        values: the changed settings, by name.
        cluster: description of this machine, for the prediction.
        repeats: number of measurements; the fastest counts.
    """
    config = config_from_tree({**REFERENCE, section: {**REFERENCE[section], **values}})
    return measured_step(config, repeats), predicted_step(config, cluster)
