"""Draws many images, divided over any number of ranks.

Each image is described by a request, in a list that is equal on every rank. The index of a request decides which rank draws
the image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raphael_dist.model.diffusion import NoiseScheduler
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.prompts import batches
from raphael_dist.sampling.sampler import Request, Sampler


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    Attributes:
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance; 1 turns guidance off.
        batch: number of images sampled at a time.
        strength: for requests with a start image, share of the steps (0..1) that are applied to it. 0 returns the image.
    """

    steps: int
    guidance: float
    batch: int = 16
    strength: float = 0.8


def draw_share(
    sampler: Sampler,
    requests: Sequence[Request],
    make_scheduler: Callable[[], NoiseScheduler],
    settings: SamplingSettings,
    ranks: Ranks,
    is_selected: Callable[[int], bool] = lambda _: True,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Draw this rank's share of the requests (descriptions of images to draw), a batch at a time.

    Args:
        sampler: the model with its encoders.
        requests: the requests of all ranks, equal on every rank.
        make_scheduler: returns a new scheduler of diffusers; called once per batch.
        settings: how images are sampled.
        ranks: this rank and the number of ranks.
        is_selected: given the index of a request, returns whether to draw it.

    Yields:
        For each batch, a list of (index of the request, image uint8 [H, W, 3]).
    """
    if ranks.is_main:
        sampler.text.warn_truncated([request.prompt for request in requests], "prompts")
        if settings.guidance != 1:  # else negative prompts have no effect
            sampler.text.warn_truncated([request.negative for request in requests], "negative prompts")
    numbers = [number for number in ranks.share(len(requests)) if is_selected(number)]
    for batch in batches(requests, numbers, settings.batch):
        images = sampler.draw(
            [requests[number] for number in batch],
            make_scheduler(),
            steps=settings.steps,
            guidance=settings.guidance,
            strength=settings.strength,
        )
        yield list(zip(batch, images, strict=True))
