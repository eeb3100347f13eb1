"""One micro-batch with all of its random numbers, so that a training step is a pure function of (weights, batch).

Shape legend: B samples, C latent channels, h and w latent height and width, Y text tokens, D text width, Hs and Ws height
and width of small images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from raphael_dist.model.device import is_gpu
from raphael_dist.model.unet_interface import GateNoise

_ALIGNMENT = 64  # bytes; kernels read vectors of up to 16 bytes


@dataclass
class Batch:
    """A micro-batch with all of its random numbers. Floating-point tensors are float32.

    Letters in shapes: B samples, C latent channels, h and w height and width of the latents, Y text tokens of width D, Hs
    and Ws height and width of the small images.

    Attributes:
        position: int64 [B], number of each sample in the order of training, counted through all epochs.
        weight: [B], weight of each sample in the loss: 1, or 0 if it only pads the micro-batch.
        x0, noise: clean latents, and the Gaussian noise to add to them, [B, C, h, w].
        timestep: int64 [B], diffusion timestep of each sample.
        text: text tokens [B, Y, D].
        text_mask: bool [B, Y], False at padding.
        end: int64 [B], index of the end-of-text token.
        edge: edge maps [B, h, w] in 0..1, or None if the run uses no edge maps.
        gate_noise: noise to add to the logits of the gates, which choose an expert for each sample (Time-MoE) and for each
            text token (Space-MoE), or None.
        small: for super-resolution, the noised low-resolution images [B, 3, Hs, Ws] in -1..1; else None.
        memory: uint8 [bytes], the block of pinned host memory that holds all tensors after `pack`; else None.
        seconds: seconds spent on building the batch, by kind of work ("reading", "decoding", "encoding").
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

    def pack(self) -> "Batch":
        """Return a copy of the batch whose CPU tensors lie in one block of pinned memory (the attribute `memory`).

        `to` can then copy all of them to a GPU at once, without making the host wait. Tensors on a GPU stay there.
        """
        offsets: dict[int, int] = {}
        size = 0
        for tensor in self.tensors():
            if _is_on_host(tensor):
                offsets[id(tensor)] = size
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)

        def copy(tensor: Tensor) -> Tensor:
            return _view(memory, offsets[id(tensor)], tensor).copy_(tensor) if _is_on_host(tensor) else tensor

        packed = self.map_tensors(copy)
        packed.memory = memory
        return packed

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`. If it is packed (see `pack`), the host does not wait for the copy to a GPU."""
        if self.memory is None or not is_gpu(device):
            return self.map_tensors(lambda tensor: tensor.to(device))
        memory = _copy_on_side_stream(self.memory, device)
        base, current = self.memory.data_ptr(), torch.cuda.current_stream(device)

        def place(tensor: Tensor) -> Tensor:
            if _is_on_host(tensor):
                return _view(memory, tensor.data_ptr() - base, tensor)
            tensor.record_stream(current)  # it was made on the encoders' stream and is used on this one
            return tensor

        batch = self.map_tensors(place)
        batch.memory = memory
        return batch

    def scale_gate_noise(self, deviation: float) -> None:
        """Multiply the noise for the gates' logits (`gate_noise`), which has a standard deviation of 1, by `deviation`.

        The batch is changed in place. Nothing happens if `gate_noise` is None.
        """
        if self.gate_noise is not None:
            self.gate_noise = GateNoise(*torch._foreach_mul(self.gate_noise, deviation))

    def tensors(self) -> list[Tensor]:
        """Return a list of all tensors of the batch. Fields that are None are left out, and also `memory`.

        `memory` is the block of pinned memory in which the tensors of a packed batch lie.
        """
        leaves = tree_leaves({**vars(self), "memory": None})
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a new batch with `function` applied to every tensor. The new batch is not packed: its `memory` is None."""
        return Batch(**tree_map_only(Tensor, function, {**vars(self), "memory": None}))


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a view of `memory` (uint8) at byte `start` with the shape and dtype of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _copy_on_side_stream(memory: Tensor, device: torch.device) -> Tensor:
    """Return a copy of pinned `memory` on the GPU `device`, made on a stream that does not wait for the last micro-step."""
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        copy = memory.to(device, non_blocking=True)
    current.wait_stream(side)
    # The side stream owns the memory. The next copy must not reuse it while this one is still read.
    copy.record_stream(current)
    return copy


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
