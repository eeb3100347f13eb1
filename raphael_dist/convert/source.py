"""A checkpoint in any layout: what it holds, as named ranges of files. Layouts differ only in how they find the ranges.

A tensor is (kind, name): one of the trainer's parameters, and "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam's
moments) or "ema" (averaged weights). Stacked experts are [K, ...], so expert k is a contiguous range.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from raphael_dist.checkpoint.reader import damage
from raphael_dist.config import Config
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.storage.tensorfile import CHUNK, FileReader, Stored

# Layouts that hold everything a run needs to go on; the others hold weights alone.
WHOLE = ("raphael", "deepspeed", "canonical")
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_STACKED = re.compile(r"(.*\.(?:space|time)_moe)\.(w1|b1|w2|b2)")


@dataclass(frozen=True)
class Range:
    """Elements [start, start + numel) of a flattened tensor lie at `stored`.

    transposed: the stretch is a matrix that is stored the other way round.
    """

    start: int
    stored: Stored
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.stored.numel


@dataclass
class Checkpoint:
    """What was found at `path`.

    files: size and SHA-256 of each file by its manifest; empty without one. updates: steps that changed the weights, which
    is what Adam counts (default: `step`). guard: the state of the rules against bad steps. notes: what the user should know.
    """

    layout: str
    path: Path
    config: Config
    step: int
    samples_seen: int
    dataset: str
    ranges: dict[tuple[str, str], list[Range]]
    files: dict[Path, dict[str, Any]] = field(default_factory=dict)
    topology: str = ""
    updates: int | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.updates = self.step if self.updates is None else self.updates
        self.shapes = parameter_shapes(self.config)
        self._reader = FileReader()
        self._whole: tuple[Range, Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing that its run had is left out."""
        return self.layout in WHOLE

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of values that are there, in the usual order."""
        return tuple(kind for kind in KINDS if any(k == kind for k, _ in self.ranges))

    def check(self) -> None:
        """Raise UserError unless every parameter of the model is there exactly once, in every kind, in files vouched for."""
        unknown = [name for _, name in self.ranges if name not in self.shapes]
        if unknown:
            raise UserError(f"{self.path}: {unknown[0]} is no parameter of the model of this configuration")
        if "master" not in self.kinds():
            raise UserError(f"{self.path}: it holds no weights ({', '.join(self.kinds()) or 'nothing at all'})")
        read = {r.stored.path for ranges in self.ranges.values() for r in ranges}
        if self.files and not read <= self.files.keys():
            raise UserError(f"{min(read - self.files.keys())} is not in the manifest; remove the one or the other")
        for kind in self.kinds():
            for name, shape in self.shapes.items():
                ranges = self.ranges.get((kind, name), [])
                ranges.sort(key=lambda r: (r.start, r.numel))
                self._check_cover(kind, name, shape, ranges)

    def _check_cover(self, kind: str, name: str, shape: tuple[int, ...], ranges: list[Range]) -> None:
        at = 0
        for r in ranges:
            if r.start != at and r.numel:
                wrong = "is missing" if r.start > at else "is there twice"
                raise UserError(f"{self.path}: {kind} of {describe(name, shape, min(at, r.start))} {wrong}")
            at += r.numel
        if at != prod(shape):
            wrong = "is missing" if at < prod(shape) else "is one too many"
            raise UserError(f"{self.path}: {kind} of {describe(name, shape, at)} {wrong}")

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32."""
        out, copied = torch.empty(0), 0
        for r in self.ranges[kind, name]:
            low, high = max(start, r.start), min(start + numel, r.start + r.numel)
            if high - low == numel:
                return self._piece(r, low - r.start, numel).float()
            out = out if out.numel() else torch.empty(numel)
            if low < high:
                out[low - start : high - start] = self._piece(r, low - r.start, high - low)
                copied += high - low
        assert copied == numel, f"{kind} of {name} has no elements {start} to {start + numel}"
        return out

    def _piece(self, r: Range, first: int, numel: int) -> Tensor:
        if not r.transposed:
            return self._reader.read(r.stored.path, r.stored.offset + first * r.stored.dtype.itemsize, r.stored.dtype, numel)
        if self._whole is None or self._whole[0] is not r:
            matrix = self._reader.read(r.stored.path, r.stored.offset, r.stored.dtype, r.numel).view(r.stored.shape)
            self._whole = (r, matrix.t().contiguous().view(-1))
        return self._whole[1][first : first + numel]

    def damage(self) -> str | None:
        """Return which file does not agree with the manifest, or None; without a manifest there is nothing to compare."""
        return damage(self.files.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the files."""
        self._reader.close()


@lru_cache(maxsize=8)
def _shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = RaphaelUNet(Config.model_validate_json(architecture))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the configuration's model, in the model's order."""
    # `megablocks` asks for its package when the model is built; shapes do not depend on it.
    model = config.model.model_copy(update={"space_backend": "auto"})
    return dict(_shapes(Config(model=model, edge=config.edge).model_dump_json()))


def stacked(name: str) -> tuple[str, str] | None:
    """Return (layer, "w1" | "b1" | "w2" | "b2") of a parameter that stacks experts, else None."""
    found = _STACKED.fullmatch(name)
    return (found[1], found[2]) if found else None


def describe(name: str, shape: tuple[int, ...], element: int) -> str:
    """Name the parameter that holds an element, and its expert."""
    if not stacked(name):
        return name
    return f"{name}, expert {element // prod(shape[1:])}"


def chunks(start: int, numel: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield (start, numel) of pieces of at most `size`."""
    for first in range(start, start + numel, size):
        yield first, min(size, start + numel - first)
