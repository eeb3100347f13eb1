"""Computes throughput, model FLOPs and memory use; tests before the first step whether a micro-batch fits into memory."""

import resource
from functools import lru_cache
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from raphael_dist.config.schema import Config
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.compiling import uncompiled
from raphael_dist.model.device import is_gpu
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.experts import Experts
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet

# Dense bfloat16 TFLOP/s by the start of the device's name, from NVIDIA's data sheets.
PEAK_BF16_TFLOPS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.0,
}


def grouped_product_flops(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of torch's grouped matrix product of tensors with shapes `a` and `b`. Other arguments are ignored.

    A tensor with 3 axes has one matrix per group. A tensor with 2 axes (m x k or k x n) is divided into groups along one
    axis. Then the product has 2 m k n FLOPs for any sizes of the groups. If both tensors have 3 axes, the product of each
    group has 2 m k n FLOPs.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * groups * a[-2] * a[-1] * b[-1])


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of fused attention on a CPU: those of the products Q K^T and P V (P: the attention probabilities).

    `query`, `key` and `value` are the shapes of these tensors. Other arguments of the operation are ignored.
    """
    return int(sdpa_flop_count(query, key, value))


def attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    """Return the FLOPs of the backward pass of fused attention on a CPU: five matrix products, as torch counts on a GPU.

    `grad` (gradient of the output), `query`, `key` and `value` are the shapes of these tensors. Other arguments are ignored.
    """
    return int(sdpa_backward_flop_count(grad, query, key, value))


# torch's own counter skips these (as of 2.13).
FLOPS = {
    torch.ops.aten._grouped_mm: grouped_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def warmup_step(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> float:
    """Run a micro-batch before the first step, to detect errors and lack of memory; return model FLOPs per sample.

    Collective. The test allocates as much memory as an optimizer step: activations, gradients, reduction buffers and Adam's
    moments. If a step has several micro-batches, the test runs two of them, because the activations of the second one exist
    together with the accumulated gradients of the first one. The gradients are dropped, and the weights do not change. With
    CPU offload in bfloat16, a step needs up to 2 bytes per parameter more than the test.

    The FLOPs are those of the forward pass without recomputation, times three, since the backward pass costs twice as much
    as the forward pass.

    Args:
        engine: the engine with the model.
        batch: a micro-batch of this rank.
        schedule: the noise schedule of the diffusion.

    Raises:
        UserError: a micro-batch does not fit into memory.
    """
    try:
        return _warm_up(engine, batch.to(engine.device), schedule)
    except torch.OutOfMemoryError:
        micro = engine.config.train.micro_batch_size
        raise UserError(
            f"train.micro_batch_size={micro} does not fit into the memory of {engine.device}. Set a smaller "
            "train.micro_batch_size, set model.checkpoint_activations=blocks, or use ds_configs/zero2_offload.json or "
            "ds_configs/zero3.json."
        ) from None


def _warm_up(engine: Engine, batch: Batch, schedule: NoiseSchedule) -> float:
    flops = forward_flops(engine.module, batch, schedule, engine.config, engine.dtype)
    if engine.fragments.moment_addresses() == []:
        engine.fragments.create_moments(0)  # as the first step would
    for last in (False, True) if engine.plan.accumulation > 1 else (True,):
        losses = compute_losses(engine, batch, schedule, engine.config, engine.dtype)
        engine.backward(losses.total.sum() * engine.plan.loss_scale, last=last)
    engine.discard_gradients()
    return 3 * flops / len(batch.weight)


def forward_flops(model: RaphaelUNet, batch: Batch, schedule: NoiseSchedule, config: Config, dtype: torch.dtype) -> int:
    """Return the FLOPs of a forward pass on `batch`, by running it. Collective with expert parallelism or ZeRO-3.

    `schedule`: noise schedule of the diffusion. `dtype`: precision of the computation.
    """
    # The counter does not see grouped_gemm's product, which is no operation of torch; torch's own has as many.
    megablocks_layers = [m for m in model.modules() if isinstance(m, Experts) and m.use_megablocks]
    for layer in megablocks_layers:
        layer.use_megablocks = False
    with uncompiled(), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        compute_losses(model, batch, schedule, config, dtype)
    for layer in megablocks_layers:
        layer.use_megablocks = True
    return int(counter.get_total_flops())


def throughput(
    samples: float, seconds: float, flops: float, device: torch.device, dtype: torch.dtype, world_size: int
) -> dict[str, float]:
    """Return metrics by name: images per second of all ranks; TFLOP/s and model FLOP utilisation (MFU) per rank.

    MFU is the share (0..1) of the device's peak TFLOP/s that is used for the model's FLOPs, without recomputation.

    Args:
        samples: number of samples that all ranks together processed.
        seconds: the time in which these samples were processed.
        flops: model FLOPs per sample, forward and backward.
        device: this rank's device.
        dtype: precision of the computation, which determines the device's peak TFLOP/s.
        world_size: number of ranks.
    """
    rate = samples / max(seconds, 1e-9)
    tflops = rate / world_size * flops / 1e12
    return {
        "throughput/samples_per_s": rate,
        "throughput/tflops": tflops,
        "throughput/mfu": tflops / peak_tflops(device, dtype),
    }


@lru_cache(maxsize=1)
def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak TFLOP/s for `dtype`: from its data sheet, or measured with a large matrix product.

    Data sheets of some GPUs are listed (PEAK_BF16_TFLOPS), for bfloat16 only.
    """
    if is_gpu(device) and dtype == torch.bfloat16:
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
    """Return the largest memory use of this process so far, in GiB.

    Args:
        device: if a GPU, the memory of the tensors on it is returned; if a CPU, the resident memory of the process.
    """
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
