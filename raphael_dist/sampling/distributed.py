"""Draws many images on any number of ranks. The number of a request decides which rank draws it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.prompts import batches
from raphael_dist.sampling.sampler import Request, Sampler


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    Attributes:
        steps: denoising steps. guidance: guidance scale. strength: see `sample_latents`.
        batch: images sampled at a time.
    """

    steps: int
    guidance: float
    batch: int = 16
    strength: float = 0.8


def draw_share(
    sampler: Sampler,
    requests: Sequence[Request],
    make_scheduler: Callable[[], Any],
    settings: SamplingSettings,
    ranks: Ranks,
    is_selected: Callable[[int], bool] = lambda _: True,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Yield (number, image uint8 [H, W, 3]) of this rank's requests whose number `is_selected`, a batch at a time."""
    if ranks.is_main:
        sampler.text.warn_truncated([request.prompt for request in requests], "prompts")
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
