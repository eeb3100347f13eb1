"""Draws a prompt and records which experts process its words, and where in the image."""

from dataclasses import dataclass

import numpy as np

from raphael_dist.analysis.recorder import Record, Recorder
from raphael_dist.analysis.routes import Words, split_words
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.sampler import Request


@dataclass(frozen=True, eq=False)
class PromptTrace:
    """A drawn image, and the routes (experts) and regions of the words of its prompt.

    Attributes:
        pixels: uint8 [H, W, 3].
        words: texts of the words.
        route_WL: space expert of each word in each block, int [W, L]; None without a Space-MoE.
        regions: region of each word in each block at `timestep`, bool [h, w].
        timestep: the timestep whose regions were recorded.
        record: all that was recorded.
    """

    pixels: np.ndarray
    words: list[str]
    route_WL: np.ndarray | None
    regions: list[list[np.ndarray]]
    timestep: float
    record: Record


def trace_prompt(
    trained: TrainedModel, prompt: str, *, steps: int, guidance: float, seed: int, timestep: int
) -> PromptTrace:
    """Draw `prompt` and record routes and regions. Regions are recorded in the denoising step nearest to `timestep`."""
    config = trained.config
    scheduler = make_scheduler(config.diffusion, config.sample.scheduler)
    scheduler.set_timesteps(steps)
    at = int((scheduler.timesteps.float() - timestep).abs().argmin())
    with Recorder(trained.model, at=at, maps=True) as recorder:
        request = Request(prompt, config.image.buckets[0], seed)
        pixels = trained.sampler.draw([request], scheduler, steps=steps, guidance=guidance)[0]
    text = trained.sampler.text
    return make_trace(pixels, split_words(text.tokenizer, prompt, text.max_tokens), recorder.record)


def make_trace(pixels: np.ndarray, words: Words, record: Record) -> PromptTrace:
    """Return the routes and regions of words, from those of tokens: a word has those of its first token."""
    route_WL, regions = None, []
    firsts = [first for first, _ in words.spans]
    if record.space_LY is not None:
        route_WL = record.space_LY[:, firsts].T.numpy()
        maps = list(zip(record.regions, record.sizes, strict=True))
        regions = [[region[first].view(size).numpy() for region, size in maps] for first in firsts]
    return PromptTrace(pixels, words.texts, route_WL, regions, record.timesteps[record.at], record)
