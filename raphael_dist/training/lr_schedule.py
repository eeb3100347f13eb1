"""The learning rate and the standard deviation of the gate noise, as functions of the optimizer step alone.

They do not depend on the number of samples seen: after a rollback a step gets other samples than before, and each entry of
train.stages may set another global batch size. Gate noise is noise on the logits of the gates that select experts.
"""

import math
from collections.abc import Callable
from functools import lru_cache

from raphael_dist.config.schema import Config
from raphael_dist.text import counted

_INTEGERS = ("num_decay_steps", "num_stable_steps", "timescale")  # arguments of transformers' schedules


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1): linear warm-up, then the schedule optim.lr_schedule.

    The first step after the warm-up has the peak rate, as in transformers' and diffusers' schedules of the same name.
    """
    optim = config.optim
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.lr
    if optim.lr_schedule == "cosine":
        progress = (step - 1 - optim.warmup_steps) / max(1, config.train.max_steps - optim.warmup_steps)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    arguments = tuple(sorted(optim.lr_schedule_args.items()))
    factor = _schedule(optim.lr_schedule, optim.lr, optim.warmup_steps, config.train.max_steps, arguments)
    return optim.lr * factor(step - 1)


def gate_noise_deviation(config: Config, step: int) -> float:
    """Return the standard deviation of the noise on the gates' logits in optimizer step `step` (from 1).

    Gates select experts; the noise varies this selection. The deviation is `model.gate_noise` at the start and falls to 0 in
    `model.gate_noise_steps` steps. If `model.gate_noise_steps` is 0, the deviation stays constant.
    """
    model = config.model
    done = (step - 1) / model.gate_noise_steps if model.gate_noise_steps else 0.0
    return model.gate_noise * annealing_factor(model.gate_noise_schedule, done)


def annealing_factor(schedule: str, done: float) -> float:
    """Return the factor of a schedule that falls from 1 (start) to 0 (end), at one point of the schedule.

    `done`: share of the schedule's steps that are complete, at least 0. If it is 1 or more, the factor is 0. `schedule`:
    "linear", "cosine" or "exponential" (0.01 to the power of `done`).
    """
    if done >= 1:
        return 0.0
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 0.01**done  # exponential


@lru_cache(maxsize=8)
def _schedule(
    name: str, lr: float, warmup: int, steps: int, arguments: tuple[tuple[str, float], ...]
) -> Callable[[int], float]:
    """Return the schedule `name` of transformers: a function from the number of steps taken to the factor of the peak rate.

    `lr`: the peak rate. `warmup`, `steps`: numbers of warm-up steps and of all steps. `arguments`: further arguments of the
    schedule as (name, value), from optim.lr_schedule_args.
    """
    import torch
    from transformers import get_scheduler

    keywords = {name: int(value) if name in _INTEGERS else value for name, value in arguments}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=keywords
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def draw_schedule(config: Config, columns: int = 40) -> str:
    """Return a one-line text plot, `columns` characters wide, of the learning rate over the steps of a run."""
    optim, last = config.optim, config.train.max_steps
    rates = [learning_rate(config, 1 + (last - 1) * column // (columns - 1)) for column in range(columns)]
    top = max(rates)
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * rate / top)] for rate in rates)
    warmup = f"warm-up of {counted(optim.warmup_steps, 'step')} to" if optim.warmup_steps else "from"
    return f"learning rate: {bars} {warmup} {optim.lr:g}, then {optim.lr_schedule}; {rates[-1]:.3g} at step {last}"
