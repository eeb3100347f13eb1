"""Distinguishes GPUs from CPUs, and copies numbers to a device without making the host wait for a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Types of device that are treated as a GPU. `tools/bench.py syncs` adds its simulated GPU.
GPU_KINDS: tuple[str, ...] = ("cuda",)


def is_gpu(device: torch.device) -> bool:
    """Return whether `device` is a GPU. A GPU works asynchronously, so reading a result makes the host wait."""
    return device.type in GPU_KINDS


def from_host(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers `values` as a tensor [n] on `device`. The host does not wait: a GPU copies from pinned memory."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if is_gpu(device) else tensor.to(device)
