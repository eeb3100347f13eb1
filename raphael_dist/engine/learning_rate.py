"""The learning rate of every step, a function of the step alone."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from raphael_dist.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1): linear warm-up, then as optim.decay says.

    The first step after the warm-up is where transformers' and diffusers' schedules of the same name have their peak.
    """
    optim = config.optim
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.decay == "constant":
        return optim.lr
    if optim.decay == "cosine":
        progress = (step - 1 - optim.warmup_steps) / max(1, config.train.max_steps - optim.warmup_steps)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    arguments = tuple(sorted(optim.decay_arguments.items()))
    factor = _factor(optim.decay, optim.lr, optim.warmup_steps, config.train.max_steps, arguments)
    return optim.lr * factor(step - 1)


@lru_cache(maxsize=8)
def _factor(
    name: str, lr: float, warmup: int, steps: int, arguments: tuple[tuple[str, float], ...]
) -> Callable[[int], float]:
    """Return transformers' own function from steps taken to a factor of the learning rate."""
    import torch
    from transformers import get_scheduler

    given: dict[str, Any] = {k: int(v) if k in _WHOLE else v for k, v in arguments}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=given
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


_WHOLE = ("num_decay_steps", "num_stable_steps", "timescale")
