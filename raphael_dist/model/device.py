"""Which devices are GPUs: they work through a queue, and the host must not wait for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Types of device for which the package does what suits a GPU. `tools/bench.py syncs` adds that of its stand-in for a GPU.
GPU_KINDS: tuple[str, ...] = ("cuda",)


def is_gpu(device: torch.device) -> bool:
    """Return whether work on `device` is queued, so that reading its results makes the host wait."""
    return device.type in GPU_KINDS


def from_host(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of the host as a vector on `device`, without a wait: a GPU copies them out of pinned memory."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if is_gpu(device) else tensor.to(device)
