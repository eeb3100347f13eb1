"""One micro-batch with everything random about it: a step is a pure function of (weights, batch).

Shape legend: B samples, C latent channels, h and w latent height and width, H and W image height and width, Y text tokens,
D text width, L transformer blocks, K experts.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from raphael_dist.model.unet import GateNoise


@dataclass
class Batch:
    """position int64 [B]; weight [B], 0 for a slot without a sample; x0 and noise [B, C, h, w]; timestep int64 [B];
    text [B, Y, D]; text_mask bool [B, Y]; end int64 [B]; edge [B, H, W] in 0..1 or None; gate noise or None.
    Floats are float32.
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

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, copied without waiting."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif isinstance(value, GateNoise):
                moved[name] = GateNoise(*(t.to(device, non_blocking=True) for t in value))
        return Batch(**moved)
