"""Randomness keyed by (seed, purpose, sample position): the same numbers on every topology and after every resume.

A counter-based generator needs no state to be saved. Nothing in a step may draw from a global generator.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for. Values are part of the data order: never renumber them."""

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
    """Return the generator of one sample position (or epoch, or step) for one purpose.

    `seed`, `position` and `extra` are non-negative integers below 2**64.
    """
    counter = np.array([0, extra, int(purpose), position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0x5240_4148], dtype=np.uint64), counter=counter))
