"""The spans of parameters that a checkpoint contains, and checks that they hold every element exactly once.

A *span* is a range of consecutive elements of a flattened parameter. Each value belongs to a parameter and a kind: fp32
weights ("master"), Adam's moments ("exp_avg", "exp_avg_sq") or moving average ("ema"). The K experts of a layer are one
parameter [K, ...], so expert k is a span of it.
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
    """A range of elements of a parameter: [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int


def default_weights(kinds: Container[str]) -> str:
    """Return which weights of a checkpoint to use by default: "ema" (moving average) if it has an EMA, else "master" (fp32).

    `kinds`: the kinds of values in the checkpoint: some of "master", "exp_avg", "exp_avg_sq" and "ema".
    """
    return "ema" if "ema" in kinds else "master"


def stacked(name: str) -> tuple[str, str] | None:
    """Split the name of a parameter with the stacked weights of K experts [K, ...] into layer and "w1", "b1", "w2" or "b2".

    For example, "a.space_moe.w1" becomes ("a.space_moe", "w1"). Returns None for the name of another parameter.
    """
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None


def coverage_error(spans: Mapping[Key, Iterable[tuple[int, int]]], kinds: Iterable[str], shapes: Shapes) -> str | None:
    """Check that spans (ranges of elements) cover each element of each parameter exactly once, for every kind.

    Args:
        spans: (start, numel) of each span, by (kind, parameter). Empty spans are ignored.
        kinds: the kinds of values that must be complete, such as "master" and "ema".
        shapes: the shape of every parameter, by name.

    Returns:
        A message about the first missing, duplicate or unexpected element; None if there is none. Unexpected are elements
        outside their parameter, and keys of `spans` with a parameter that is not in `shapes` or a kind that is not in
        `kinds`.
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
