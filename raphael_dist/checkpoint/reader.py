"""Reads a checkpoint: its manifest, and any range of any tensor, from whichever files hold it.

A checkpoint is a folder `step-00000100/` with one `rank-00000.safetensors` per rank that wrote it and a `manifest.json`,
written last. Keys are `<kind>/<parameter>`: a flat range of the parameter's fp32 weights (master), Adam moments (exp_avg,
exp_avg_sq) or average (ema). Where a range starts stands in the manifest and in the file's header. Nothing is pickled.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from raphael_dist.checkpoint.folders import followed, step_folders, step_of
from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import Key, fault
from raphael_dist.config import ARCHITECTURE_FIELDS, Config, config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.storage.files import damage
from raphael_dist.storage.tensorfile import FileReader, Stored, read_header

T = TypeVar("T")


class CheckpointReader:
    """One checkpoint folder. Raises UserError when its manifest is missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, Stored]] = {}  # of the files that were opened
        self._files = FileReader()
        self.manifest = read_manifest(folder / MANIFEST)
        if step_of(folder) not in (None, self.step):
            raise UserError(f"{folder}: its manifest is that of step {self.step}")

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {name: tuple(shape) for name, shape in self.manifest["tensors"].items()}

    def config(self) -> Config:
        """Return the configuration of the run that wrote the checkpoint."""
        return config_from_tree(self.manifest["config"])

    def damage(self, files: list[str] | None = None, tell: Callable[[str], None] = lambda _: None) -> str | None:
        """Return what is wrong with these files (all, by default), or None when sizes and checksums agree.

        `tell` gets a word about every file.
        """
        names = list(self.manifest["files"]) if files is None else files
        wrong = damage(((self.folder / name, self.manifest["files"][name]) for name in names), tell)
        return None if wrong is None else wrong.removeprefix(f"{self.folder}/")

    def incomplete(self) -> str | None:
        """Return which tensor lacks elements, has some twice or belongs to no parameter; None when all is there once."""
        spans = {key: [(start, numel) for start, numel, _ in ranges] for key, ranges in self._ranges.items()}
        return fault(spans, sorted(self.kinds() | {"master"}), self.shapes)

    @cached_property
    def _ranges(self) -> dict[Key, list[tuple[int, int, str]]]:
        """For each tensor, the (start, numel, file name) of its spans, in order, by the manifest: no file is opened."""
        ranges = defaultdict(list)
        for name, entry in self.manifest["files"].items():
            listed = entry.get("ranges") or {key: (t.start, t.numel) for key, t in self._stored(name).items()}
            for key, (start, numel) in listed.items():
                kind, _, parameter = key.partition("/")
                ranges[kind, parameter].append((start, numel, name))
        return {key: sorted(spans) for key, spans in ranges.items()}

    def _stored(self, name: str) -> dict[str, Stored]:
        """Return the tensors of a file by their keys. UserError when it holds others than the manifest says."""
        if name not in self._headers:
            tensors, metadata = read_header(self.folder / name)
            listed = self.manifest["files"][name].get("ranges")
            try:
                starts = {key: start for key, (start, _) in listed.items()} if listed else json.loads(metadata["starts"])
                stored = {key: replace(tensor, start=int(starts[key])) for key, tensor in tensors.items()}
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(f"{self.folder / name} does not say where its tensors start: {error}") from None
            if listed and {key: [t.start, t.numel] for key, t in stored.items()} != {k: list(r) for k, r in listed.items()}:
                raise UserError(f"{self.folder / name} holds other tensors than the manifest says")
            self._headers[name] = stored
        return self._headers[name]

    def kinds(self) -> set[str]:
        """Return the kinds of values the checkpoint holds."""
        return {kind for kind, _ in self._ranges}

    def spans(self) -> dict[Key, list[Stored]]:
        """Return where everything lies; the headers of all files are read. UserError when one cannot be."""
        return {
            (kind, name): [self._stored(file)[f"{kind}/{name}"] for _, _, file in ranges]
            for (kind, name), ranges in self._ranges.items()
        }

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32. UserError when any is missing.

        Only files that hold some of them are opened.
        """
        ranges = self._ranges.get((kind, name), [])
        files = [file for first, size, file in ranges if first < start + numel and start < first + size]
        try:
            return self._files.read((self._stored(file)[f"{kind}/{name}"] for file in files), start, numel)
        except LookupError as error:
            raise UserError(f"checkpoint {self.folder}: {kind} of {name} has {error}") from None

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a whole tensor in its shape, float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, prod(shape)).view(shape)


def check_architecture(found: Config, wanted: Config, where: str) -> None:
    """Raise UserError naming the first field in which a checkpoint's model differs from the configuration's."""
    for name in ARCHITECTURE_FIELDS:
        theirs, ours = (attrgetter(name)(config) for config in (found, wanted))
        if theirs != ours:
            raise UserError(
                f"{name}: the checkpoint in {where} has {theirs}, this configuration gives {ours}; "
                "use the checkpoint's configuration or another run.dir"
            )
    if (found.edge.weight > 0) != (wanted.edge.weight > 0) or found.edge.channels != wanted.edge.channels:
        raise UserError(f"edge: the checkpoint in {where} has other edge modules; keep edge.weight and edge.channels")


def newest(root: Path) -> list[Path]:
    """Return the checkpoint folders below `root`, the newest first, whole or not. UserError when `root` is unreadable."""
    try:
        return step_folders(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from None


def open_newest(path: Path) -> CheckpointReader:
    """Open a checkpoint folder, or the newest of a run directory that verifies. UserError when there is none."""

    def verified(folder: Path) -> CheckpointReader:
        reader = CheckpointReader(folder)
        wrong = reader.damage()
        if wrong:
            raise UserError(wrong)
        return reader

    path = followed(path)
    return first_good(path, verified, f"--checkpoint {path}")[0]


def first_good(path: Path, open_step: Callable[[Path], T], given: str) -> tuple[T, list[str]]:
    """Open a checkpoint folder, or the newest in a run directory for which `open_step` raises no UserError.

    Returns also what was wrong with each newer one. UserError, which begins with what was `given`, when there is none.
    """
    folders = [path] if (path / MANIFEST).is_file() else newest(path / "checkpoints") or newest(path)
    problems: list[str] = []
    for folder in folders:
        try:
            return open_step(folder), problems
        except UserError as error:
            problems.append(f"{folder.name}: {error}")
    damaged = f"; damaged: {'; '.join(problems)}" if problems else ""
    raise UserError(f"{given}: no checkpoint there{damaged}; give a run directory or one of its step-* folders")
