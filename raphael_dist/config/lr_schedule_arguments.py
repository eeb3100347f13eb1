"""The learning-rate schedules that `optim.lr_schedule` may name, and the arguments of each."""

from collections.abc import Iterator, Mapping
from typing import Literal

LrSchedule = Literal[
    "constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "inverse_sqrt", "cosine_with_min_lr",
    "warmup_stable_decay",
]  # fmt: skip
# Names and arguments as in transformers and diffusers, without warm-up and length.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": (),
    "linear": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("power", "lr_end"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio"),
}
REQUIRED = {"cosine_with_min_lr": ("min_lr", "min_lr_rate"), "warmup_stable_decay": ("num_decay_steps",)}  # one of them
ENDLESS = ("constant", "inverse_sqrt")  # do not depend on train.max_steps


def check_lr_schedule(schedule: str, arguments: Mapping[str, float]) -> Iterator[str]:
    """Yield an error message for each unknown argument of a learning-rate schedule, and for a missing required argument.

    Args:
        schedule: name of the schedule, the value of optim.lr_schedule.
        arguments: its arguments by name, the value of optim.lr_schedule_args.
    """
    names = ARGUMENTS[schedule]
    for name in arguments:
        if name not in names:
            known = f"its arguments are {', '.join(names)}" if names else "it has no arguments"
            yield (
                f"optim.lr_schedule_args={dict(arguments)} must be arguments of optim.lr_schedule={schedule}, but {name} "
                f"is not one of them ({known}). Remove {name}, or choose another schedule."
            )
    required = REQUIRED.get(schedule, ())
    if required and not set(required) & set(arguments):
        yield (
            f"optim.lr_schedule={schedule} requires the argument {' or '.join(required)}, but "
            f"optim.lr_schedule_args={dict(arguments)} does not have it. Set optim.lr_schedule_args={{{required[0]}: "
            "VALUE}."
        )
