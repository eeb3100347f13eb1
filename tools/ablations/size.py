"""Computes the size of a model variant without running it, and the expert width that makes two variants equally large."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.errors import UserError
from raphael_dist.planning.trace import SAMPLES, trace

_ROUND, _WIDE = 8, 256  # widths of _WIDE and more are rounded to multiples of _ROUND, for GPUs


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        parameters: number of all parameters, also those of gates and of the modules that predict edge maps.
        flops: FLOPs of one training image, forward and backward, if every space expert processes every image token.
    """

    parameters: int
    flops: int


def size_of(config: Config) -> Size:
    """Compute the size of the model that a configuration describes, without building it."""
    return Size(_parameters(config), _flops(config))


def matched_widths(target: Config, config: Config, what: Literal["parameters", "flops"]) -> tuple[int, ...]:
    """Return expert widths, one per U-Net level, with which the model of `config` is as large as that of `target`.

    All widths of `config` are scaled by one factor. The number of parameters and of FLOPs is linear in this factor, so the
    result is exact up to rounding. `what`: whether both models shall have equally many parameters or equally many FLOPs.

    Raises:
        UserError: even the smallest width gives a larger model.
    """
    measure = {"parameters": _parameters, "flops": _flops}[what]
    base = config.model.expert_width
    single, double = measure(config), measure(_with_widths(config, tuple(2 * width for width in base)))
    scale = 1 + (measure(target) - single) / (double - single)
    step = _ROUND if scale * min(base) >= _WIDE else 1
    if scale * min(base) < 0.5:
        raise UserError(
            f"even with the smallest model.expert_width, {config.model.space_experts} space experts and "
            f"{config.model.time_experts} time experts have more {what} than the full model. Leave this variant out of "
            "--variants."
        )
    return tuple(max(step, round(scale * width / step) * step) for width in base)


def _with_widths(config: Config, widths: tuple[int, ...]) -> Config:
    tree = config.model_dump(mode="json")
    tree["model"]["expert_width"] = list(widths)
    return config_from_tree(tree)


def _parameters(config: Config) -> int:
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def _flops(config: Config) -> int:
    return _traced(config.model_dump_json())


@lru_cache(maxsize=256)
def _traced(text: str) -> int:
    traced = trace(Config.model_validate_json(text), SAMPLES[0], "none")
    return round(traced.total(traced.flops) / traced.samples)
