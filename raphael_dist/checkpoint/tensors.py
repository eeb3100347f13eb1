"""What a checkpoint is made of: spans of the values of parameters, and the check that they hold every element exactly once.

A value belongs to a kind and a parameter: the fp32 weights ("master"), Adam's moments ("exp_avg", "exp_avg_sq") or the
moving average ("ema"). Stacked experts are one parameter [K, ...], so expert k is a contiguous span of it.
"""

import re
from collections.abc import Iterable, Mapping
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


def stacked(name: str) -> tuple[str, str] | None:
    """Return (layer, "w1" | "b1" | "w2" | "b2") of a parameter that stacks experts, else None."""
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None


def fault(spans: Mapping[Key, Iterable[tuple[int, int]]], kinds: Iterable[str], shapes: Shapes) -> str | None:
    """Return what is wrong unless the spans hold every element of every kind of every parameter exactly once; else None.

    spans: (start, numel) of each, by kind and parameter; those without elements do not matter.
    """
    kinds = tuple(kinds)
    for kind, name in spans:
        if name not in shapes:
            return f"{kind} of {name} belongs to no parameter of the model"
        if kind not in kinds:
            return f"{kind} of {name} is one kind of values too many"
    for kind in kinds:
        for name, shape in shapes.items():
            at, total = 0, prod(shape)
            for start, numel in sorted(spans.get((kind, name), ())):
                if start != at and numel:
                    wrong = "missing" if start > at else "there twice"
                    return f"{kind} of {_element(name, shape, min(at, start))} is {wrong}"
                at += numel
            if at != total:
                return f"{kind} of {_element(name, shape, at)} is {'missing' if at < total else 'one too many'}"
    return None


def _element(name: str, shape: tuple[int, ...], element: int) -> str:
    return f"{name}, expert {element // prod(shape[1:])}" if stacked(name) else f"{name}, element {element}"
