"""Assembles micro-batches: everything drawn for a sample depends on (seed, position) alone."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raphael_dist.config import Config
from raphael_dist.data.encoding import AheadEncoder, Encoded
from raphael_dist.data.stream import TrainStream
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import draw_offset, draw_timestep
from raphael_dist.model.unet import GateNoise
from raphael_dist.rng import Purpose, generator


def annealed(schedule: str, done: float) -> float:
    """Return what is left of a deviation when the share `done` of its schedule is over: 1 at first, 0 from the end on."""
    if done >= 1:
        return 0.0
    left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "exponential": 0.01**done}
    return left[schedule]


class BatchBuilder:
    """Turns the (position, weight) pairs of a micro-step into a `Batch`; a pair of weight 0 only fills a place."""

    def __init__(
        self,
        config: Config,
        stream: TrainStream,
        encoder: AheadEncoder,
        num_blocks: int,
        *,
        global_batch: int | None = None,
        gate_noise: bool = True,
        pin: bool = False,
    ) -> None:
        """`global_batch`: positions over which timesteps are stratified (default: `train.global_batch`).

        `pin`: put the batch into pinned memory, which a GPU copies without making the host wait.
        """
        self.config, self.stream, self.encoder, self.num_blocks = config, stream, encoder, num_blocks
        self.seed, self.global_batch = config.run.seed, global_batch or config.train.global_batch
        self.phase = 0  # where in [0, global_batch) steps begin
        self.pin = pin
        self.gate_noise = gate_noise and config.model.gate_noise > 0

    def build(self, slots: Sequence[tuple[int, float]]) -> Batch:
        """Read, encode and assemble one micro-batch. UserError: the data cannot go on (`TrainStream`)."""
        return self.packed(
            self._assembled(slots, self.encoder.encode(self.stream.samples([position for position, _ in slots])))
        )

    def packed(self, batch: Batch) -> Batch:
        """Return the batch as it is given out: in pinned memory with `pin`."""
        began = time.monotonic()
        batch = batch.packed() if self.pin else batch
        batch.seconds["copying"] = time.monotonic() - began
        return batch

    def stand_in(self, slots: Sequence[tuple[int, float]]) -> Batch:
        """Return a micro-batch with the shapes of `build(slots)`, zeros for samples, and weights of 0.

        For a rank whose data cannot go on: the others wait for it in collectives until all know.
        """
        source, place = self.stream.source, self.stream.order.lookup(slots[0][0])
        height, width = (side // source.latent_factor for side in source.buckets[place.bucket])
        encoded = self.encoder.zeros(len(slots), (source.latent_channels, height, width))
        return self._assembled([(position, 0.0) for position, _ in slots], encoded)

    def _assembled(self, slots: Sequence[tuple[int, float]], encoded: Encoded) -> Batch:
        positions = [position for position, _ in slots]
        return Batch(
            position=torch.tensor(positions),
            weight=torch.tensor([weight for _, weight in slots], dtype=torch.float32),
            x0=encoded.x0,
            noise=torch.stack([self._noise(p, encoded.x0.shape[1:]) for p in positions]),
            timestep=torch.tensor(
                [draw_timestep(self.config.diffusion, self.seed, p, self.global_batch, self.phase) for p in positions]
            ),
            text=encoded.text,
            text_mask=encoded.mask,
            end=encoded.end,
            edge=encoded.edge,
            gate_noise=self._gate_noise(positions, encoded.text.shape[1]) if self.gate_noise else None,
            small=None if encoded.small is None else self._small(positions, encoded.small),
            seconds=encoded.seconds,
        )

    def _noise(self, position: int, shape: torch.Size) -> Tensor:
        draw = generator(self.seed, Purpose.NOISE, position)
        noise = torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))
        strength = self.config.recipe.offset_noise
        return noise + strength * draw_offset(self.seed, position, len(noise)) if strength else noise

    def _small(self, positions: Sequence[int], small_B3HsWs: Tensor) -> Tensor:
        """Return small pictures in -1..1 with the noise that makes a model forgive what another one has drawn."""
        signed, most = small_B3HsWs.float() / 127.5 - 1, self.config.upscale.noise
        if not most:
            return signed
        draws = [generator(self.seed, Purpose.UPSCALE, position) for position in positions]
        noise = [d.uniform(0, most) * d.standard_normal(tuple(signed.shape[1:]), dtype=np.float32) for d in draws]
        return signed + torch.from_numpy(np.stack(noise).astype(np.float32)).to(signed.device)

    def _gate_noise(self, positions: Sequence[int], tokens: int) -> GateNoise:
        m = self.config.model
        time = self._normal(Purpose.TIME_GATE, positions, (self.num_blocks, m.time_experts))
        space = self._normal(Purpose.SPACE_GATE, positions, (self.num_blocks, tokens, m.space_experts))
        scale = torch.tensor([self._gate_noise_at(position) for position in positions])
        return GateNoise(time * scale.view(-1, 1, 1), space * scale.view(-1, 1, 1, 1))

    def _gate_noise_at(self, position: int) -> float:
        """Return the deviation of a position's gate noise: from `gate_noise` to 0 over `gate_noise_steps` steps."""
        m = self.config.model
        done = (position - self.phase) // self.global_batch / m.gate_noise_steps if m.gate_noise_steps else 0.0
        return m.gate_noise * annealed(self.config.recipe.gate_noise_schedule, done)

    def _normal(self, purpose: Purpose, positions: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        draws = [generator(self.seed, purpose, p).standard_normal(shape, dtype=np.float32) for p in positions]
        return torch.from_numpy(np.stack(draws))
