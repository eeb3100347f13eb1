"""Drawing many images on any number of ranks: which rank draws what follows from the number of a request alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raphael_dist.parallel.ranks import Ranks
from raphael_dist.sampling.prompts import batches
from raphael_dist.sampling.sampling import Request, Sampler


@dataclass(frozen=True)
class Settings:
    """How images are drawn: denoising steps, guidance, images at a time, and the share that is drawn of a given picture."""

    steps: int
    guidance: float
    batch: int = 16
    strength: float = 0.8


def draw_share(
    sampler: Sampler,
    requests: Sequence[Request],
    make_scheduler: Callable[[], Any],
    settings: Settings,
    ranks: Ranks,
    wanted: Callable[[int], bool] = lambda _: True,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Yield (number, uint8 [H, W, 3]) of this rank's requests, a batch at a time: every one whose number is `wanted`."""
    mine = [number for number in range(ranks.rank, len(requests), ranks.world_size) if wanted(number)]
    for numbers in batches(requests, mine, settings.batch):
        images = sampler.draw(
            [requests[number] for number in numbers],
            make_scheduler(),
            steps=settings.steps,
            guidance=settings.guidance,
            strength=settings.strength,
        )
        yield list(zip(numbers, images, strict=True))
