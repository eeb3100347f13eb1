"""Throughput, model FLOPs and memory, and what one micro-batch adds to the metrics."""

import resource
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import Losses, compute_losses
from raphael_dist.training.metrics import Metrics

# Dense bfloat16 TFLOP/s by the start of the device's name, from NVIDIA's data sheets.
PEAK_BF16_TFLOPS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.0,
}


def dry_run(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> float:
    """Run one micro-batch before step 1, so that what cannot work or fit fails now; return model FLOPs per sample.

    Counts the forward pass without recomputation, times three (forward, and backward at twice its cost). Then a forward and
    backward pass to the input alone, which leaves no gradient behind, but under ZeRO-3, where recomputation forbids it.
    """
    try:
        return _dry_run(engine, batch.to(engine.device), schedule)
    except torch.OutOfMemoryError:
        micro = engine.config.train.micro_batch
        raise UserError(
            f"train.micro_batch = {micro} does not fit into the memory of {engine.device}; use a smaller one, "
            "model.checkpoint_activations=true, or ds_configs/zero3.json"
        ) from None


def _dry_run(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute_losses(engine.module, batch, schedule, engine.config, engine.dtype)
    if engine.stage < 3:
        batch.x0.requires_grad_()
        losses = compute_losses(engine.module, batch, schedule, engine.config, engine.dtype)
        torch.autograd.grad(losses.total.sum(), batch.x0)
    return 3 * counter.get_total_flops() / len(batch.weight)


def record(metrics: Metrics, batch: Batch, losses: Losses, bytes_sent: int) -> None:
    """Add a micro-batch's sums to the metrics, without waiting for the device; `bytes_sent` went to experts elsewhere."""
    count = batch.weight.sum()
    metrics.add("samples", count, "sum")
    for tag, value in (("loss", losses.total), ("loss_denoise", losses.denoise), ("loss_edge", losses.edge)):
        metrics.add(f"train/{tag}", value.sum(), "mean", count)
    if losses.space_used is not None:
        metrics.add("load/space", losses.space_used, "sum")
    if losses.time_load is not None:
        metrics.add("load/time", losses.time_load, "sum")
    metrics.add("comm/bytes_sent", float(bytes_sent), "sum")
    metrics.add("memory/peak_gib", peak_gib(batch.weight.device), "max")


def throughput(
    samples: float, seconds: float, flops: float, device: torch.device, dtype: torch.dtype, world_size: int
) -> dict[str, float]:
    """Return images per second of all ranks, and model TFLOP/s and FLOP utilisation per rank."""
    rate = samples / max(seconds, 1e-9)
    tflops = rate / world_size * flops / 1e12
    return {
        "throughput/samples_per_s": rate,
        "throughput/tflops": tflops,
        "throughput/mfu": tflops / peak_tflops(device, dtype),
    }


@lru_cache(maxsize=1)
def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak: from its data sheet where known, else measured by a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for start, peak in PEAK_BF16_TFLOPS.items():
            if name.startswith(start):
                return peak
    size = 1024
    a, best = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(4):
        began = perf_counter()
        float((a @ a)[0, 0])
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best / 1e12


def peak_gib(device: torch.device) -> float:
    """Return the largest memory use so far, in GiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_array(image: Any) -> np.ndarray:
    """Return a PIL image as uint8 [h, w, 3]."""
    return np.asarray(image.convert("RGB"))
