"""Assembles micro-batches. All random numbers of a sample depend only on the seed and the sample's global position."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raphael_dist.config.schema import Config
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoded
from raphael_dist.data.stream import TrainStream
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import draw_offset, draw_timestep
from raphael_dist.model.unet_interface import GateNoise
from raphael_dist.rng import Purpose, generator


class BatchBuilder:
    """Builds the `Batch` of a micro-step (one forward and backward pass).

    Its methods get `slots`, a (position, weight) pair for each place in the micro-batch. The position is the sample's number
    in the endless order of training, from 0. The weight is 1 for a sample, and 0 for a place that only pads the batch.

    Attributes:
        phase: Position of the first sample of a training step, modulo `global_batch_size`. Timesteps are stratified over
            the samples of a step, so the builder must know where a step begins. 0 by default; the trainer sets this
            attribute when a run starts or resumes.
    """

    def __init__(
        self,
        config: Config,
        stream: TrainStream,
        encoder: BatchEncoder,
        num_blocks: int,
        *,
        global_batch_size: int | None = None,
        gate_noise: bool = True,
        pin: bool = False,
    ) -> None:
        """Create the builder.

        Args:
            config: Configuration of the run.
            stream: Returns the sample at a position.
            encoder: Encodes images and captions that are not encoded yet.
            num_blocks: Number of transformer blocks of the model. A batch contains noise for the gates of each block.
            global_batch_size: Number of consecutive positions over which timesteps are stratified: each position draws from
                a different part of the range of timesteps (default: `train.global_batch_size`).
            gate_noise: Whether to draw the noise that training adds to the gates' logits, if `model.gate_noise` is above 0.
            pin: Put the batch into pinned memory, from which it is copied to a GPU asynchronously.
        """
        self.config, self.stream, self.encoder, self.num_blocks = config, stream, encoder, num_blocks
        self.seed = config.run.seed
        self.global_batch_size = global_batch_size or config.train.global_batch_size
        self.phase = 0
        self.pin = pin
        self.gate_noise = gate_noise and config.model.gate_noise > 0

    def build(self, slots: Sequence[tuple[int, float]]) -> Batch:
        """Read, encode and assemble one micro-batch.

        `slots`: (position, weight) of each sample. The position is the sample's number in the endless order of training. The
        weight is 1, or 0 for a sample that only pads the batch. Raises UserError if too many samples cannot be used.
        """
        samples = self.stream.samples([position for position, _ in slots])
        return self.finalize(self._assemble(slots, self.encoder.encode(samples)))

    def finalize(self, batch: Batch) -> Batch:
        """Return `batch`, copied to pinned memory if the builder was created with `pin=True`.

        The duration of the copy, in seconds, is stored in `seconds["copying"]` of the returned batch.
        """
        began = time.monotonic()
        batch = batch.pack() if self.pin else batch
        batch.seconds["copying"] = time.monotonic() - began
        return batch

    def dummy_batch(self, slots: Sequence[tuple[int, float]]) -> Batch:
        """Return a micro-batch with the shapes of `build(slots)`, but with zeros as samples and all weights 0.

        `slots`: (position, weight) of each sample, as for `build`. The image size is that of the sample at the first
        position. A rank that has failed to read its data runs the step with this batch and then reports the failure. Without
        a batch it would skip the step's collective operations, in which the other ranks would wait forever.
        """
        source, place = self.stream.source, self.stream.order.lookup(slots[0][0])
        height, width = (side // source.latent_factor for side in source.buckets[place.bucket])
        encoded = self.encoder.zeros(len(slots), (source.latent_channels, height, width))
        return self._assemble([(position, 0.0) for position, _ in slots], encoded)

    def _assemble(self, slots: Sequence[tuple[int, float]], encoded: Encoded) -> Batch:
        positions = [position for position, _ in slots]
        return Batch(
            position=torch.tensor(positions),
            weight=torch.tensor([weight for _, weight in slots], dtype=torch.float32),
            x0=encoded.x0,
            noise=torch.stack([self._noise(p, encoded.x0.shape[1:]) for p in positions]),
            timestep=torch.tensor(
                [draw_timestep(self.config.diffusion, self.seed, p, self.global_batch_size, self.phase) for p in positions]
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
        strength = self.config.diffusion.offset_noise
        return noise + strength * draw_offset(self.seed, position, len(noise)) if strength else noise

    def _small(self, positions: Sequence[int], small_B3HsWs: Tensor) -> Tensor:
        """Convert small images (inputs of super-resolution), uint8 [B, 3, Hs, Ws], to float32 in -1..1, and add noise.

        The noise (upscale.noise) prepares the model for sampling, where small images are generated and have errors.
        `positions`: position of each sample in the endless order of training, which is the seed of the sample's noise.
        """
        signed, max_noise = small_B3HsWs.float() / 127.5 - 1, self.config.upscale.noise
        if not max_noise:
            return signed
        draws = [generator(self.seed, Purpose.UPSCALE, position) for position in positions]
        noise = [d.uniform(0, max_noise) * d.standard_normal(tuple(signed.shape[1:]), dtype=np.float32) for d in draws]
        return signed + torch.from_numpy(np.stack(noise).astype(np.float32)).to(signed.device)

    def _gate_noise(self, positions: Sequence[int], tokens: int) -> GateNoise:
        """Return standard normal noise for the logits of the gates of all blocks. The trainer later scales the noise.

        `positions`: position of each sample in the endless order of training, which is the seed of the sample's noise.
        `tokens`: number of tokens of a caption; each token has its own space gate.
        """
        m = self.config.model
        time = self._normal(Purpose.TIME_GATE, positions, (self.num_blocks, m.time_experts))
        space = self._normal(Purpose.SPACE_GATE, positions, (self.num_blocks, tokens, m.space_experts))
        return GateNoise(time, space)

    def _normal(self, purpose: Purpose, positions: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        draws = [generator(self.seed, purpose, p).standard_normal(shape, dtype=np.float32) for p in positions]
        return torch.from_numpy(np.stack(draws))
