"""Random numbers that depend on (seed, purpose, sample position) only: equal on any number of ranks and after a resume.

A counter-based generator has no state that a checkpoint would have to save. Nothing in a step may draw from a global
generator.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What random numbers are used for (argument of `generator`). Different purposes get different numbers.

    The values are part of the generators' counters: changing a value changes every run.

    Attributes:
        ORDER: order of the samples in an epoch.
        CAPTION, FLIP, DROP: choice of a sample's caption, whether its image is mirrored, whether its caption is dropped.
        TIMESTEP, STRATA: a sample's diffusion timestep, and (stratified sampling) the subrange from which it is drawn.
        NOISE, OFFSET: noise on a sample's latents, and the part of it that is constant in each channel.
        TIME_GATE, SPACE_GATE: noise on the logits of the gates that choose time experts and space experts.
        POSTERIOR: sampling from the VAE's posterior.
        UPSCALE: noise on the small image of super-resolution.
    """

    ORDER = 0
    CAPTION = 1
    FLIP = 2
    DROP = 3
    TIMESTEP = 4
    NOISE = 5
    TIME_GATE = 6
    SPACE_GATE = 7
    POSTERIOR = 8
    STRATA = 9
    OFFSET = 10
    UPSCALE = 12


def generator(seed: int, purpose: Purpose, position: int, extra: int = 0) -> np.random.Generator:
    """Return a new random generator whose numbers depend on the arguments only. All arguments are from 0 to 2**64 - 1.

    Args:
        seed: the seed of the run.
        purpose: what the numbers are used for.
        position: number of a sample in the order of training, or number of an epoch or step.
        extra: number that distinguishes generators with the same seed, purpose and position.
    """
    counter = np.array([0, extra, int(purpose), position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0x5240_4148], dtype=np.uint64), counter=counter))
