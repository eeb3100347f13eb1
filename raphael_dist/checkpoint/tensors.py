"""The content of a checkpoint: spans of the values of parameters, and the check that every element is there exactly once.

Each value belongs to a kind and a parameter. Kinds are the fp32 weights ("master"), Adam's moments ("exp_avg", "exp_avg_sq")
and the moving average ("ema"). Stacked experts are one parameter [K, ...], so expert k is a contiguous span of it.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import prod

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
Key = tuple[str, str]  # kind, name of the parameter
Shapes = Mapping[str, tuple[int, ...]]  # of whole parameters, by name
_STACKED = re.compile(r"(.*\.(?:space|time)_moe)\.(w1|b1|w2|b2)")


@dataclass(frozen=True)
class Span:
    """Elements [start, start + numel) of the parameter `name`, flattened."""

    name: str
    start: int
    numel: int


def default_weights(kinds: Container[str]) -> str:
    """Return the kind of weights to sample from, start from or export: the EMA if there is one, else the weights."""
    return "ema" if "ema" in kinds else "master"


def stacked(name: str) -> tuple[str, str] | None:
    """Return (layer, "w1" | "b1" | "w2" | "b2") of a parameter that stacks experts, else None."""
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None


def coverage_error(spans: Mapping[Key, Iterable[tuple[int, int]]], kinds: Iterable[str], shapes: Shapes) -> str | None:
    """Return what is wrong unless the spans hold every element of every kind of every parameter exactly once; else None.

    Args:
        spans: (start, numel) of each span, by kind and parameter. Empty spans are ignored.
        kinds: the kinds that must be complete.
        shapes: the shape of every parameter.
    """
    kinds = tuple(kinds)
    for kind, name in spans:
        if name not in shapes:
            return f"{kind} of {name} belongs to a parameter that the model does not have"
        if kind not in kinds:
            return f"{kind} of {name} is not expected, since the kinds are {', '.join(kinds)}"
    for kind in kinds:
        for name, shape in shapes.items():
            at, total = 0, prod(shape)
            for start, numel in sorted(spans.get((kind, name), ())):
                if start != at and numel:
                    problem = "missing" if start > at else "present twice"
                    return f"{kind} of {_element(name, shape, min(at, start))} is {problem}"
                at += numel
            if at != total:
                return f"{kind} of {_element(name, shape, at)} is {'missing' if at < total else 'outside its parameter'}"
    return None


def _element(name: str, shape: tuple[int, ...], element: int) -> str:
    return f"{name}, expert {element // prod(shape[1:])}" if stacked(name) else f"{name}, element {element}"
