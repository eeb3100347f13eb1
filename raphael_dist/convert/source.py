"""A checkpoint in any layout: what it holds, as spans of parameters in files. Layouts differ only in how they find them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import START, Progress
from raphael_dist.checkpoint.tensors import KINDS, Key, fault
from raphael_dist.config import Config
from raphael_dist.errors import UserError
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.storage.files import damage
from raphael_dist.storage.tensorfile import CHUNK, FileReader, Stored


@dataclass
class Checkpoint:
    """What lies at `path`.

    Attributes:
        spans: where the values of each kind of each parameter are.
        files: size and SHA-256 of each file by its manifest; empty without one.
        topology: which ranks wrote it, in words.
        dataset: what its run was trained on, as a checksum.
        notes: what the user should know.
        layout, whole: the name of its layout, and whether that holds all that a run had; `open_checkpoint` sets them.
        says_prediction: whether its files say what the model predicts; else `config` has a default for it.
    """

    path: Path
    config: Config
    spans: dict[Key, list[Stored]]
    progress: Progress = START
    dataset: str = ""
    files: dict[Path, dict[str, Any]] = field(default_factory=dict)
    topology: str = ""
    notes: list[str] = field(default_factory=list)
    layout: str = ""
    whole: bool = False
    says_prediction: bool = True

    def __post_init__(self) -> None:
        self.shapes = parameter_shapes(self.config)
        self._reader = FileReader()

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of values that are there, in the usual order."""
        return tuple(kind for kind in KINDS if any(k == kind for k, _ in self.spans))

    def check(self) -> None:
        """Raise UserError unless every parameter of the model is there exactly once, in every kind, in files vouched for."""
        if "master" not in self.kinds():
            raise UserError(f"{self.path}: it holds no weights ({', '.join(self.kinds()) or 'nothing at all'})")
        read = {span.path for spans in self.spans.values() for span in spans}
        if self.files and not read <= self.files.keys():
            raise UserError(f"{min(read - self.files.keys())} is not in the manifest; remove the one or the other")
        wrong = fault(
            {key: [(s.start, s.numel) for s in spans] for key, spans in self.spans.items()}, self.kinds(), self.shapes
        )
        if wrong:
            raise UserError(f"{self.path}: {wrong}")
        for spans in self.spans.values():
            spans.sort(key=lambda span: (span.start, span.numel))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32. LookupError when there are none."""
        return self._reader.read(self.spans[kind, name], start, numel)

    def state_prediction(self, given: str | None) -> None:
        """Take the user's word for what the model predicts where the files do not say. UserError: they say otherwise, or
        nobody does.
        """
        found, need = self.config.diffusion.prediction, "give --prediction epsilon or v_prediction"
        if self.says_prediction and given not in (None, found):
            raise UserError(f"--prediction {given}: {self.path} says that its model predicts {found}; leave it out")
        if not self.says_prediction and given is None:
            raise UserError(f"{self.path}: no scheduler beside it says what its model predicts; {need}")
        diffusion = self.config.diffusion.model_copy(update={"prediction": given or found})
        self.config, self.says_prediction = self.config.model_copy(update={"diffusion": diffusion}), True

    def check_prediction(self, wanted: str) -> None:
        """Raise UserError unless the model is known to predict what a run that starts from it trains it to predict."""
        if not self.says_prediction:
            raise UserError(
                f"run.init_from: no scheduler beside {self.path} says what its model predicts; put its scheduler/ there, or "
                "convert it with tools/convert_checkpoint.py --prediction epsilon or v_prediction"
            )
        if self.config.diffusion.prediction != wanted:
            raise UserError(other_prediction("run.init_from", self.path, self.config.diffusion.prediction, wanted))

    def damage(self) -> str | None:
        """Return which file does not agree with the manifest, or None; without a manifest there is nothing to compare."""
        return damage(self.files.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the files."""
        self._reader.close()


@lru_cache(maxsize=8)
def _structure(architecture: str) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    with torch.device("meta"):
        model = RaphaelUNet(Config.model_validate_json(architecture))
    blocks = [name for name, module in model.named_modules() if isinstance(module, TransformerBlock)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, dict(zip(blocks, model.block_levels, strict=True))


def _structure_of(config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    # `megablocks` asks for its package when the model is built; shapes do not depend on it.
    model = config.model.model_copy(update={"space_backend": "auto"})
    return _structure(Config(model=model, edge=config.edge, upscale=config.upscale).model_dump_json())


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the configuration's model, in the model's order."""
    return dict(_structure_of(config)[0])


def block_levels(config: Config) -> dict[str, int]:
    """Return the name of every transformer block of the model with its U-Net level, in order of execution."""
    return dict(_structure_of(config)[1])


def other_prediction(field: str, path: Path, found: str, wanted: str) -> str:
    """Return what is wrong with a model that predicts another thing than a run is to train."""
    return (
        f"{field}: the model of {path} predicts {found}, the run trains diffusion.prediction = {wanted}; set "
        f"diffusion.prediction={found}, or choose another model"
    )


def is_dense(config: Config) -> bool:
    """Return whether the model has neither experts nor edge modules, so that diffusers has a class for it."""
    m = config.model
    return not (m.space_experts or m.time_experts or config.edge.weight > 0)


def chunks(start: int, numel: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield (start, numel) of pieces of at most `size`."""
    for first in range(start, start + numel, size):
        yield first, min(size, start + numel - first)
