"""Draws an image for a prompt and records the experts of the prompt's words, and where in the image these experts work."""

from dataclasses import dataclass

import numpy as np

from raphael_dist.analysis.gate_routes import Words, split_words
from raphael_dist.analysis.recorder import Record, Recorder
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.sampler import Request


@dataclass(frozen=True, eq=False)
class PromptTrace:
    """An image drawn for a prompt, with the space expert and the regions of each word of the prompt.

    A word's region is the part of the image that attends to the word. The word's space expert processes this part.

    Attributes:
        pixels: the image, uint8 [H, W, 3].
        words: the words of the prompt.
        route_WL: space expert of each word in each block, int [W, L]; None without a Space-MoE.
        regions: for each word and block, the region of the word at `timestep`, bool [h, w]; [] without a Space-MoE.
        timestep: the timestep of the denoising step whose regions were recorded.
        record: the experts and regions of all text tokens, and the time experts.
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
    """Draw an image for `prompt` and record the experts of its words, and where in the image these experts work.

    Args:
        trained: the model, with its text and image encoders.
        prompt: the caption.
        steps: number of denoising steps.
        guidance: guidance scale.
        seed: seed of the noise from which the image is drawn.
        timestep: the regions of words are recorded in the denoising step nearest to this timestep.
    """
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
    """Build a `PromptTrace`. A word gets the experts and regions that were recorded for its first text token.

    Args:
        pixels: the drawn image, uint8 [H, W, 3]; stored in the result without change.
        words: the words of the prompt, each with its first text token.
        record: the experts and regions of all text tokens, recorded while the image was drawn.
    """
    route_WL, regions = None, []
    firsts = [first for _, first in words]
    if record.space_LY is not None:
        route_WL = record.space_LY[:, firsts].T.numpy()
        maps = list(zip(record.regions, record.sizes, strict=True))
        regions = [[region[first].view(size).numpy() for region, size in maps] for first in firsts]
    return PromptTrace(pixels, [word for word, _ in words], route_WL, regions, record.timesteps[record.at], record)
