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


class HostCopy:
    """A copy of a tensor on the host. The GPU makes the copy after its earlier work, and only `read` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        """Start to copy `tensor`, which may have any shape and dtype. A tensor on a CPU is not copied."""
        self._tensor, self._copied = tensor, None
        if is_gpu(tensor.device):
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> Tensor:
        """Return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
