"""How large a variant is, reckoned without running it, and the width that makes two equally large."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from raphael_dist.config import Config, config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.planning.memory import shapes_of
from raphael_dist.planning.trace import SAMPLES, trace

_ROUND, _WIDE = 8, 256  # widths from _WIDE on are multiples of _ROUND, as products want on GPUs; below, that is too coarse


@dataclass(frozen=True)
class Size:
    """parameters: of the whole model, edge modules and gates too. flops: of training on one image, forward and backward,
    with every space expert on every image token, as on a GPU."""

    parameters: int
    flops: int


def size_of(config: Config) -> Size:
    """Return the size of a configuration's model."""
    return Size(_parameters(config), _flops(config))


def matched_widths(target: Config, config: Config, what: Literal["parameters", "flops"]) -> tuple[int, ...]:
    """Return the expert widths of `config`, all scaled alike, that give it as many parameters or FLOPs as `target`.

    Both counts are straight lines over the scale, so that two points tell it; rounding is what stays. UserError: even the
    least width is too much.
    """
    measure = {"parameters": _parameters, "flops": _flops}[what]
    base = config.model.expert_width
    one, two = measure(config), measure(_with_widths(config, tuple(2 * width for width in base)))
    scale = 1 + (measure(target) - one) / (two - one)
    step = _ROUND if scale * min(base) >= _WIDE else 1
    if scale * min(base) < 0.5:
        raise UserError(
            f"model.expert_width: nothing is narrow enough for {config.model.space_experts} space and "
            f"{config.model.time_experts} time experts to have as many {what} as the whole model; leave this variant out"
        )
    return tuple(max(step, round(scale * width / step) * step) for width in base)


def _with_widths(config: Config, widths: tuple[int, ...]) -> Config:
    tree = config.model_dump(mode="json")
    tree["model"]["expert_width"] = list(widths)
    return config_from_tree(tree)


def _parameters(config: Config) -> int:
    return sum(prod(shape) for shape in shapes_of(config).values())


def _flops(config: Config) -> int:
    return _traced(config.model_dump_json())


@lru_cache(maxsize=256)
def _traced(text: str) -> int:
    traced = trace(Config.model_validate_json(text), SAMPLES[0], "none")
    return round(traced.total(traced.flops) / traced.samples)
