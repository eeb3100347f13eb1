"""One micro-batch with everything random about it: a step is a pure function of (weights, batch).

Shape legend: B samples, C latent channels, h and w latent height and width, H and W image height and width, Y text tokens,
D text width, L transformer blocks, K experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from raphael_dist.config import Config
from raphael_dist.data.stream import StreamSample, TrainStream
from raphael_dist.diffusion import draw_timestep
from raphael_dist.model.unet import GateNoise
from raphael_dist.rng import Purpose, generator


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


class BatchBuilder:
    """Turns (position, weight) slots into a Batch; everything drawn depends on (seed, position) alone."""

    def __init__(self, config: Config, stream: TrainStream, num_blocks: int, *, gate_noise: bool = True) -> None:
        self.config, self.stream, self.num_blocks = config, stream, num_blocks
        self.seed = config.run.seed
        self.gate_noise = gate_noise and config.model.gate_noise > 0

    def build(self, slots: Sequence[tuple[int, float]]) -> Batch:
        """Read and assemble one micro-batch."""
        samples = [self.stream.sample(position) for position, _ in slots]
        positions = [position for position, _ in slots]
        edges = [s.edge for s in samples if s.edge is not None]
        return Batch(
            position=torch.tensor(positions),
            weight=torch.tensor([weight for _, weight in slots], dtype=torch.float32),
            x0=torch.stack([s.latents for s in samples]),
            noise=torch.stack([self._noise(p, s) for p, s in zip(positions, samples, strict=True)]),
            timestep=torch.tensor(
                [draw_timestep(self.config.diffusion, self.seed, p, self.config.train.global_batch) for p in positions]
            ),
            text=torch.stack([s.tokens for s in samples]).float(),
            text_mask=torch.stack([s.mask for s in samples]),
            end=torch.stack([torch.as_tensor(s.end) for s in samples]),
            edge=torch.stack(edges) if len(edges) == len(samples) else None,
            gate_noise=self._gate_noise(positions, samples) if self.gate_noise else None,
        )

    def _noise(self, position: int, sample: StreamSample) -> Tensor:
        draw = generator(self.seed, Purpose.NOISE, position)
        return torch.from_numpy(draw.standard_normal(tuple(sample.latents.shape), dtype=np.float32))

    def _gate_noise(self, positions: Sequence[int], samples: Sequence[StreamSample]) -> GateNoise:
        m, tokens = self.config.model, samples[0].tokens.shape[0]
        time = self._normal(Purpose.TIME_GATE, positions, (self.num_blocks, m.time_experts))
        space = self._normal(Purpose.SPACE_GATE, positions, (self.num_blocks, tokens, m.space_experts))
        return GateNoise(time * m.gate_noise, space * m.gate_noise)

    def _normal(self, purpose: Purpose, positions: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        draws = [generator(self.seed, purpose, p).standard_normal(shape, dtype=np.float32) for p in positions]
        return torch.from_numpy(np.stack(draws))
