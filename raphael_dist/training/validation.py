"""Validation loss at fixed noise, and sample grids, with the work spread over all ranks."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from raphael_dist.config import Config
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.source import DataSource
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.insight.figures import bands, overlays, route_table
from raphael_dist.insight.prompt import followed
from raphael_dist.insight.recorder import Record, Recorder
from raphael_dist.insight.routes import words_of
from raphael_dist.model.diffusion import NoiseSchedule, make_scheduler
from raphael_dist.model.objective import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan, run_of, unit_of
from raphael_dist.parallel.ranks import Ranks, agree, all_reduce_sum
from raphael_dist.sampling.prompts import sample_requests
from raphael_dist.sampling.sampling import Request, Sampler

RECORDED_AT = 0.6  # of the denoising steps: the regions that are shown
TIME_BINS = 4
MIN_DRAWS = 32


class Validator:
    """The denoising loss on every held-out pair, at noise and timesteps that never change; a few pairs take several rounds.

    `val/loss_t0` .. `val/loss_t3` split it by quarters of the timestep range, t0 the least noisy.
    """

    def __init__(self, config: Config, ranks: Ranks, data: DataSource, engine: Engine, schedule: NoiseSchedule) -> None:
        self._config, self._ranks, self._engine, self._schedule = config, ranks, engine, schedule
        assert data.held_out is not None
        pairs = data.held_out.order.samples_per_epoch
        micro, unit, run = config.train.micro_batch, unit_of(config), run_of(config, training=False)
        group = ranks_together(config, engine, ranks.world_size)
        # Whole rounds over the pairs, as many on any number of ranks; ranks for which there are none have no part in it.
        count = pairs * -(-max(MIN_DRAWS, group) // pairs)
        self._drawing = drawing_ranks(count, ranks.world_size, group, min(group * micro, run or group * micro))
        self._plan = BatchPlan(count, self._drawing, micro, unit, run)
        options = {"global_batch": count, "gate_noise": False}
        self._builder = data.batches_of(data.held_out, config, engine.module.num_blocks, engine.device, **options)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Return the scalars by tag. Collective. UserError on all ranks: the data of one cannot go on."""
        failure: UserError | None = None
        sums, device = torch.zeros(2, TIME_BINS, device=self._engine.device), self._engine.device
        self._engine.module.eval()
        for micro in range(self._plan.accumulation if self._ranks.rank < self._drawing else 0):
            slots = self._plan.slots(0, self._ranks.rank, micro)
            try:
                batch = self._builder.build(slots).to(device)
            except UserError as error:  # a group's ranks meet in the forward passes
                failure, batch = failure or error, self._builder.stand_in(slots).to(device)
            losses = compute_losses(self._engine.module, batch, self._schedule, self._config, self._engine.dtype)
            bins = batch.timestep * TIME_BINS // self._config.diffusion.num_timesteps
            sums[0].index_add_(0, bins, losses.denoise)
            sums[1].index_add_(0, bins, batch.weight)
        self._engine.module.train()
        agree(None, failure)
        loss, count = all_reduce_sum(sums, device)
        values = {"val/loss": float(loss.sum() / count.sum())}
        return values | {f"val/loss_t{i}": float(loss[i] / count[i]) for i in range(TIME_BINS) if count[i] > 0}


def ranks_together(config: Config, engine: Engine, world_size: int) -> int:
    """Return how many consecutive ranks must run the model's forward pass together, because it holds collectives."""
    return world_size if engine.stage == 3 else unit_of(config)


def drawing_ranks(count: int, world_size: int, group: int, span: int) -> int:
    """Return how many ranks draw `count` samples: a multiple of `group`, such that every group has samples to draw.

    group: ranks that run the model together. span: samples that a group draws at a time.
    """
    units = min(-(-count // span), count // group, world_size // group)
    return max(1, units) * group


def prompt_share(num_prompts: int, rank: int, world_size: int, group: int) -> list[int]:
    """Return the numbers of the prompts that a rank draws: [] where there are none left for its group.

    Ranks of a group draw equally many, so that they meet in collectives; the last prompt is then drawn more than once.
    """
    each = -(-num_prompts // world_size)
    if rank // group * group * each >= num_prompts:
        return []
    return [min(rank * each + i, num_prompts - 1) for i in range(each)]


def ready_to_sample(config: Config, ranks: Ranks, engine: Engine, text: TextEncoder, image: ImageEncoder) -> list[Request]:
    """Return what is drawn while training; pictures are read and encoders loaded where it will be.

    What is wrong with them is better found before the first step: UserError.
    """
    group = ranks_together(config, engine, ranks.world_size)
    mine = prompt_share(len(config.sample.prompts), ranks.rank, ranks.world_size, group)
    if mine:
        text.ready()
        image.ready()
    return sample_requests(config, mine)


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of the requests, uint8 [P, H, W, 3], and what the first of them went through."""

    images: np.ndarray
    record: Record


def draw_samples(
    config: Config,
    ranks: Ranks,
    engine: Engine,
    ema: Ema | None,
    text: TextEncoder,
    image: ImageEncoder,
    requests: Sequence[Request],
) -> Samples | None:
    """Return images of the requests, all of one size, from the averaged weights, on rank 0. Collective."""
    s, size = config.sample, requests[0].size_hw
    mine = prompt_share(len(requests), ranks.rank, ranks.world_size, ranks_together(config, engine, ranks.world_size))
    images = torch.zeros(len(requests), *size, 3, dtype=torch.uint8)
    engine.module.eval()
    recorder = Recorder(engine.module, at=round(RECORDED_AT * s.steps) - 1)
    with nullcontext() if ema is None else ema.in_model():
        if mine:
            scheduler = make_scheduler(config.diffusion, s.scheduler)
            sampler = Sampler.of(engine.module, text, image)
            with recorder if ranks.is_main else nullcontext():
                drawn = sampler.draw([requests[i] for i in mine], scheduler, steps=s.steps, guidance=s.guidance)
            for i, image_HW3 in zip(mine, drawn, strict=True):
                if i // len(mine) == ranks.rank:  # else it was drawn only so that the group's ranks draw equally many
                    images[i] = torch.from_numpy(image_HW3)
    engine.module.train()
    # Every image is one rank's, and nothing elsewhere: the sum is all of them. Its size does not grow with the ranks.
    images = images.to(engine.device)
    dist.reduce(images, dst=0)
    return Samples(images.cpu().numpy(), recorder.record) if ranks.is_main else None


def figures_of(samples: Samples, prompt: str, text: TextEncoder) -> dict[str, Image.Image]:
    """Return figures by tag of what the first sample went through: routes and regions of its words, its time experts."""
    record, figures = samples.record, {}
    if record.time_LS is not None:
        figures["paths/time"] = bands(record.time_LS.numpy(), record.timesteps, "time expert of each block by timestep")
    seen = followed(samples.images[0], words_of(text.tokenizer, prompt, text.max_tokens), record)
    if seen.route_WL is not None and seen.words:
        figures["paths/words"] = route_table(seen.words, seen.route_WL, f"space expert of each word by block: {prompt}")
        title = f"regions at timestep {seen.timestep:.0f}: {prompt}"
        figures["paths/regions"] = overlays(seen.pixels, seen.words, seen.regions, seen.route_WL, title)
    return figures
