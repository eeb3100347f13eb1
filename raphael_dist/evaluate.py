"""Validation loss at fixed noise, and sample grids, with the work spread over all ranks."""

from typing import Any

import numpy as np
import torch

from raphael_dist.config import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.stream import TrainStream
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import compute_losses
from raphael_dist.parallel import ranks as parallel
from raphael_dist.parallel.batch_plan import BatchPlan, run_of, unit_of
from raphael_dist.sampling.sampling import generate

TIME_BINS = 4
MIN_DRAWS = 32


class Validator:
    """The denoising loss on every held-out pair, at noise and timesteps that never change; a few pairs take several rounds.

    `val/loss_t0` .. `val/loss_t3` split it by quarters of the timestep range, t0 the least noisy.
    """

    def __init__(
        self, config: Config, ranks: parallel.Ranks, stream: TrainStream, engine: Engine, schedule: NoiseSchedule
    ) -> None:
        self._config, self._ranks, self._engine, self._schedule = config, ranks, engine, schedule
        pairs = stream.order.samples_per_epoch
        # Whole rounds over the pairs; at least one sample per rank, since a collective in the model must find every rank.
        count = pairs * -(-max(MIN_DRAWS, ranks.world_size) // pairs)
        micro, unit, run = config.train.micro_batch, unit_of(config), run_of(config, training=False)
        self._plan = BatchPlan(count, ranks.world_size, micro, unit, run)
        self._builder = BatchBuilder(config, stream, engine.module.num_blocks, global_batch=count, gate_noise=False)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Return the scalars by tag. Collective."""
        sums, device = torch.zeros(2, TIME_BINS, device=self._engine.device), self._engine.device
        self._engine.module.eval()
        for micro in range(self._plan.accumulation):
            batch = self._builder.build(self._plan.slots(0, self._ranks.rank, micro)).to(device)
            losses = compute_losses(self._engine.module, batch, self._schedule, self._config, self._engine.dtype)
            bins = batch.timestep * TIME_BINS // self._config.diffusion.num_timesteps
            sums[0].index_add_(0, bins, losses.denoise)
            sums[1].index_add_(0, bins, batch.weight)
        self._engine.module.train()
        loss, count = parallel.total(sums, device)
        values = {"val/loss": float(loss.sum() / count.sum())}
        return values | {f"val/loss_t{i}": float(loss[i] / count[i]) for i in range(TIME_BINS) if count[i] > 0}


def sample_prompts(
    config: Config, ranks: parallel.Ranks, engine: Engine, ema: Ema | None, text: TextEncoder, image: ImageEncoder
) -> np.ndarray:
    """Return images of `sample.prompts`, uint8 [P, H, W, 3], from the averaged weights, each rank making its part."""
    s, prompts = config.sample, list(config.sample.prompts)
    each = -(-len(prompts) // ranks.world_size)
    mine = [min(ranks.rank * each + i, len(prompts) - 1) for i in range(each)]
    arguments: dict[str, Any] = {"steps": s.steps, "guidance": s.guidance, "scheduler": s.scheduler, "seed": s.seed}

    def make() -> np.ndarray:
        captions = [prompts[i] for i in mine]
        size = config.image.buckets[0]
        return generate(engine.module, text, image, config.diffusion, captions, mine, size_hw=size, **arguments)

    engine.module.eval()
    if ema is None:
        images = make()
    else:
        with ema.in_model():
            images = make()
    engine.module.train()
    return np.concatenate(parallel.gather(images))[: len(prompts)]
