"""One micro-batch with everything random about it: a step is a pure function of (weights, batch).

Shape legend: B samples, C latent channels, h and w latent height and width, Y text tokens, D text width,
L transformer blocks, K experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raphael_dist.model.device import is_gpu
from raphael_dist.model.unet import GateNoise

_ALIGNMENT = 64  # bytes; kernels read whole vectors of up to 16


@dataclass
class Batch:
    """position int64 [B]; weight [B], 0 for a slot without a sample; x0 and noise [B, C, h, w]; timestep int64 [B];
    text [B, Y, D]; text_mask bool [B, Y]; end int64 [B]; edge [B, h, w] in 0..1 or None; gate noise or None; small
    [B, 3, Hs, Ws] in -1..1, small pictures with their noise (model/upscale.py), or None. Floats are float32. memory: uint8,
    the one stretch of memory that all on the host lie in, or None. seconds: what making it took, by kind of work.
    """

    position: Tensor
    weight: Tensor
    x0: Tensor
    noise: Tensor
    timestep: Tensor
    text: Tensor
    text_mask: Tensor
    end: Tensor
    edge: Tensor | None
    gate_noise: GateNoise | None
    small: Tensor | None = None
    memory: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def packed(self) -> "Batch":
        """Return the batch in one stretch of pinned memory on the host, which a GPU copies at one go without a wait.

        What was encoded on a device stays there.
        """
        tensors: list[Tensor] = []
        self._map(lambda tensor: tensors.append(tensor) if _on_host(tensor) else None)
        memory = torch.empty(sum(_room(t) for t in tensors), dtype=torch.uint8, pin_memory=True)
        start = 0

        def put(tensor: Tensor) -> Tensor:
            nonlocal start
            if not _on_host(tensor):
                return tensor
            place = _at(memory, start, tensor).copy_(tensor)
            start += _room(tensor)
            return place

        return Batch(**self._map(put), memory=memory, seconds=self.seconds)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; nothing is copied when it is there, and a GPU's host does not wait if `packed`."""
        if self.memory is None or not is_gpu(device):
            return Batch(**self._map(lambda tensor: tensor.to(device)), seconds=self.seconds)
        memory = _copy_aside(self.memory, device)
        offset, current = self.memory.data_ptr(), torch.cuda.current_stream(device)

        def there(tensor: Tensor) -> Tensor:
            if _on_host(tensor):
                return _at(memory, tensor.data_ptr() - offset, tensor)
            tensor.record_stream(current)  # it was made on the encoders' stream, and is used on this one from here on
            return tensor

        return Batch(**self._map(there), memory=memory, seconds=self.seconds)

    def _map(self, function: Callable[[Tensor], Any]) -> dict[str, Any]:
        """Return the fields with `function` applied to each tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("memory", "seconds")}
        for name, value in values.items():
            if isinstance(value, GateNoise):
                values[name] = GateNoise(*(function(tensor) for tensor in value))
            elif value is not None:
                values[name] = function(value)
        return values


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the view of `memory` (uint8) from byte `start` on that has the shape and dtype of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _copy_aside(memory: Tensor, device: torch.device) -> Tensor:
    """Copy pinned memory to a GPU on a stream of its own, so that the copy does not queue behind the last micro-step."""
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        copied = memory.to(device, non_blocking=True)
    current.wait_stream(side)
    # It was allocated for the side stream: its memory must not serve the next copy while this one is still computed with.
    copied.record_stream(current)
    return copied


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
