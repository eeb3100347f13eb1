"""Validation loss at fixed noise, and sample grids, with the work divided over all ranks."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from raphael_dist.analysis.gate_routes import split_words
from raphael_dist.analysis.recorder import Recorder
from raphael_dist.analysis.route_figures import draw_bands, draw_overlays, draw_routes
from raphael_dist.analysis.trace_prompt import PromptTrace, make_trace
from raphael_dist.config.schema import Config
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.run_data import DataSource
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule, make_scheduler
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan, bucket_run_length, ranks_per_unit
from raphael_dist.runtime.ranks import Ranks, all_reduce_sum, raise_if_any_failed
from raphael_dist.sampling.prompts import sample_requests
from raphael_dist.sampling.sampler import Request, Sampler
from raphael_dist.training.route_probe import RouteProbe

RECORDED_AT = 0.6  # share of the denoising steps after which the regions of words are recorded
TIME_BINS = 4
MIN_DRAWS = 32


class Validator:
    """Measures the denoising loss on every held-out pair (image and caption), at noise and timesteps that never change.

    If there are few pairs, each is used several times with different noise. `val/loss_t0` .. `val/loss_t3` are the losses in
    the four quarters of the timestep range; t0 has the least noise. Routes are the experts that gates select for text tokens
    and timesteps. The share of routes that changed since the last validation is measured on the first micro-batch.
    """

    def __init__(self, config: Config, ranks: Ranks, data: DataSource, engine: Engine, schedule: NoiseSchedule) -> None:
        self._config, self._ranks, self._engine, self._schedule = config, ranks, engine, schedule
        assert data.held_out is not None
        pairs = data.held_out.order.samples_per_epoch
        micro, unit, run = config.train.micro_batch_size, ranks_per_unit(config), bucket_run_length(config, training=False)
        group = forward_group_size(config, engine, ranks.world_size)
        # Whole rounds over the pairs, the same number of samples on any number of ranks. Ranks without samples do nothing.
        count = pairs * -(-max(MIN_DRAWS, group) // pairs)
        self._active_ranks = active_ranks(count, ranks.world_size, group, min(group * micro, run or group * micro))
        self._plan = BatchPlan(count, self._active_ranks, micro, unit, run)
        options = {"global_batch_size": count, "gate_noise": False}
        self._builder = data.builder(config, engine.module.num_blocks, engine.device, data.held_out, **options)
        self._probe, self._routes = RouteProbe(), dict[str, float]()

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Return metrics by name: validation losses, gate entropies and shares of changed routes. Collective.

        A gate entropy is 0 if gates are certain which expert to select, 1 if all experts are equally likely. Changed routes
        are text tokens and timesteps for which a gate selects another expert than at the last call. Raises UserError on all
        ranks if the data of any rank fails.
        """
        failure: UserError | None = None
        sums, device = torch.zeros(2, TIME_BINS, device=self._engine.device), self._engine.device
        self._engine.module.eval()
        for micro in range(self._plan.accumulation if self._ranks.rank < self._active_ranks else 0):
            slots = self._plan.slots(0, self._ranks.rank, micro)
            try:
                batch = self._builder.build(slots).to(device)
            except UserError as error:  # the forward pass may be a collective of a group of ranks
                failure, batch = failure or error, self._builder.dummy_batch(slots).to(device)
            if micro == 0 and self._ranks.is_main and failure is None:
                self._routes = self._probe.measure(self._engine.module, batch)
            losses = compute_losses(self._engine.module, batch, self._schedule, self._config, self._engine.dtype)
            bins = batch.timestep * TIME_BINS // self._config.diffusion.num_timesteps
            sums[0].index_add_(0, bins, losses.denoise)
            sums[1].index_add_(0, bins, batch.weight)
        self._engine.module.train()
        raise_if_any_failed(None, failure)
        loss, count = all_reduce_sum(sums, device)
        values = {"val/loss": float(loss.sum() / count.sum())}
        values |= self._routes  # of rank 0, which writes them
        return values | {f"val/loss_t{i}": float(loss[i] / count[i]) for i in range(TIME_BINS) if count[i] > 0}


def forward_group_size(config: Config, engine: Engine, world_size: int) -> int:
    """Return the size of the groups of consecutive ranks that must run a forward pass together, because it has collectives.

    Args:
        config: the run's configuration.
        engine: the engine of the model.
        world_size: number of ranks.

    Returns:
        The size; 1 if every rank can run a forward pass alone.
    """
    return world_size if engine.stage == 3 else ranks_per_unit(config)


def active_ranks(count: int, world_size: int, group: int, span: int) -> int:
    """Return how many ranks process `count` samples, at least one per rank if possible. Other ranks do nothing.

    The result is a multiple of `group`, and at least `group`.

    Args:
        count: number of samples.
        world_size: number of ranks.
        group: number of consecutive ranks that must run the model together.
        span: number of samples that a group processes at a time.
    """
    units = min(-(-count // span), count // group, world_size // group)
    return max(1, units) * group


def prompt_share(num_prompts: int, rank: int, world_size: int, group: int) -> list[int]:
    """Return the indices of the prompts for which a rank draws images; [] if its group of ranks draws none.

    All ranks of a group (`group` consecutive ranks) draw the same number of images, because their forward passes are
    collective. Some ranks may draw the last prompt again for this reason.
    """
    per_rank = -(-num_prompts // world_size)
    if rank // group * group * per_rank >= num_prompts:
        return []
    return [min(rank * per_rank + i, num_prompts - 1) for i in range(per_rank)]


def ready_to_sample(config: Config, ranks: Ranks, engine: Engine, text: TextEncoder, image: ImageEncoder) -> list[Request]:
    """Return the requests for images to draw during training, and load what this rank needs to draw its share.

    A rank that draws images loads the weights of the encoders `text` and `image`, and reads the input images of its
    requests. Raises UserError for mistakes in the requests, before the first step.
    """
    group = forward_group_size(config, engine, ranks.world_size)
    share = prompt_share(len(config.sample.prompts), ranks.rank, ranks.world_size, group)
    if share:
        text.load_weights()
        image.load_weights()
    return sample_requests(config, share)


def draw_samples(
    config: Config,
    ranks: Ranks,
    engine: Engine,
    ema: Ema | None,
    text: TextEncoder,
    image: ImageEncoder,
    requests: Sequence[Request],
) -> tuple[np.ndarray, PromptTrace] | None:
    """Draw one image for each request. Collective.

    Returns on rank 0 the images, uint8 [P, H, W, 3] for P requests; and, for the first image, the experts that the gates
    selected for each word of its caption, and the image region of each word. Returns None on other ranks.

    `ema`: the averaged weights, which draw the images; None: use the current weights. `text` and `image`: the encoders.
    `requests`: captions with size and seed; all must have the same size.
    """
    s, size = config.sample, requests[0].size_hw
    share = prompt_share(len(requests), ranks.rank, ranks.world_size, forward_group_size(config, engine, ranks.world_size))
    images = torch.zeros(len(requests), *size, 3, dtype=torch.uint8)
    engine.module.eval()
    recorder = Recorder(engine.module, at=round(RECORDED_AT * s.steps) - 1)
    with nullcontext() if ema is None else ema.in_model():
        if share:
            scheduler = make_scheduler(config.diffusion, s.scheduler)
            sampler = Sampler.of(engine.module, text, image)
            if ranks.is_main:
                text.warn_truncated([request.prompt for request in requests], "prompts")
            with recorder if ranks.is_main else nullcontext():
                drawn = sampler.draw([requests[i] for i in share], scheduler, steps=s.steps, guidance=s.guidance)
            for i, image_HW3 in zip(share, drawn, strict=True):
                if i // len(share) == ranks.rank:  # else it is a repetition
                    images[i] = torch.from_numpy(image_HW3)
    engine.module.train()
    # Each image is 0 on all ranks but one, so that the sum has all of them.
    images = images.to(engine.device)
    dist.reduce(images, dst=0)
    if not ranks.is_main:
        return None
    pixels = images.cpu().numpy()
    words = split_words(text.tokenizer, requests[0].prompt, text.max_tokens)
    return pixels, make_trace(pixels[0], words, recorder.record)


def figures_of(trace: PromptTrace, prompt: str) -> dict[str, Image.Image]:
    """Return figures about a drawn image, by tag: the experts and image regions of the caption's words, the time experts.

    `trace`: the image, with the experts and regions that were recorded while it was drawn. `prompt`: its caption.
    """
    record, figures = trace.record, {}
    if record.time_LS is not None:
        figures["paths/time"] = draw_bands(record.time_LS.numpy(), record.timesteps, "time expert of each block by timestep")
    if trace.route_WL is not None and trace.words:
        figures["paths/words"] = draw_routes(trace.words, trace.route_WL, f"space expert of each word by block: {prompt}")
        title = f"regions at timestep {trace.timestep:.0f}: {prompt}"
        figures["paths/regions"] = draw_overlays(trace.pixels, trace.words, trace.regions, trace.route_WL, title)
    return figures
