"""One prompt drawn while its words are followed through the experts."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from raphael_dist.insight.recorder import Record, Recorder
from raphael_dist.insight.routes import Words, words_of
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.sampling.load import Trained
from raphael_dist.sampling.sampling import Request


@dataclass(frozen=True, eq=False)
class Followed:
    """A picture, and what its words went through.

    pixels: uint8 [H, W, 3]. route_WL: space expert per word and block, int [W, L], or None without a Space-MoE. regions:
    for each word and block, bool [h, w], at `timestep`.
    """

    pixels: np.ndarray
    words: list[str]
    route_WL: np.ndarray | None
    regions: list[list[np.ndarray]]
    timestep: float
    record: Record

    @property
    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def follow(trained: Trained, prompt: str, *, steps: int, guidance: float, seed: int, timestep: int) -> Followed:
    """Draw `prompt` and record it; regions are those of the step whose timestep is nearest to `timestep`."""
    config = trained.config
    scheduler = make_scheduler(config.diffusion, config.sample.scheduler)
    scheduler.set_timesteps(steps)
    at = int((scheduler.timesteps.float() - timestep).abs().argmin())
    with Recorder(trained.model, at=at, maps=True) as recorder:
        request = Request(prompt, config.image.buckets[0], seed)
        pixels = trained.sampler.draw([request], scheduler, steps=steps, guidance=guidance)[0]
    text = trained.sampler.text
    return followed(pixels, words_of(text.tokenizer, prompt, text.max_tokens), recorder.record)


def followed(pixels: np.ndarray, words: Words, record: Record) -> Followed:
    """Put a picture, its words and what was recorded together: a word has the route and region of its first token."""
    route_WL, regions = None, []
    firsts = [first for first, _ in words.spans]
    if record.space_LY is not None:
        route_WL = record.space_LY[:, firsts].T.numpy()
        maps = list(zip(record.regions, record.sizes, strict=True))
        regions = [[region[first].view(size).numpy() for region, size in maps] for first in firsts]
    return Followed(pixels, words.texts, route_WL, regions, record.timesteps[record.at], record)
