"""Reads a checkpoint: its manifest, and any range of any tensor, from whichever files hold it.

A checkpoint is a folder `step-00000100/` with one `rank-00000.safetensors` per rank that wrote it and a `manifest.json`,
written last. Keys are `<kind>/<parameter>`: a flat range of the parameter's fp32 weights (master), Adam moments (exp_avg,
exp_avg_sq) or average (ema). Where a range starts stands in the file's header. Nothing is pickled.
"""

import hashlib
import json
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raphael_dist.config import ARCHITECTURE_FIELDS, Config, config_from_tree
from raphael_dist.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointReader:
    """One checkpoint folder. Raises UserError when its manifest is missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"checkpoint {folder}: no {MANIFEST}; it was never finished") from None
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder}: {MANIFEST} is unreadable: {error}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise UserError(f"checkpoint {folder}: {MANIFEST} is not of format {FORMAT}")
        lacking = {"step", "samples_seen", "dataset", "config", "tensors", "files"} - self.manifest.keys()
        if lacking:
            raise UserError(f"checkpoint {folder}: {MANIFEST} lacks {', '.join(sorted(lacking))}")
        unsafe = [name for name in self.manifest["files"] if Path(name).name != name]
        if unsafe:
            raise UserError(f"checkpoint {folder}: {MANIFEST} names a file outside the folder: {unsafe[0]!r}")

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {name: tuple(shape) for name, shape in self.manifest["tensors"].items()}

    def config(self) -> Config:
        """Return the configuration of the run that wrote the checkpoint."""
        return config_from_tree(self.manifest["config"])

    def damage(self, files: list[str] | None = None) -> str | None:
        """Return what is wrong with these files (all, by default), or None when sizes and checksums agree."""
        for name in self.manifest["files"] if files is None else files:
            entry, path = self.manifest["files"][name], self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
        return None

    @cached_property
    def _ranges(self) -> dict[str, list[tuple[int, int, Any, str]]]:
        """For each key, the (start, numel, open file, file name) of its ranges, in order."""
        ranges = defaultdict(list)
        for name in self.manifest["files"]:
            try:
                file = safe_open(self.folder / name, framework="pt")
                starts = json.loads((file.metadata() or {})["starts"])
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                raise UserError(f"checkpoint {self.folder}: {name} is unreadable: {error}") from None
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                ranges[key].append((int(starts[key]), file.get_slice(key).get_shape()[0], file, name))
        return {key: sorted(found, key=lambda r: r[0]) for key, found in ranges.items()}

    def kinds(self) -> set[str]:
        """Return the kinds of values the checkpoint holds."""
        return {key.partition("/")[0] for key in self._ranges}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32. UserError when any is missing."""
        out, at = torch.empty(numel), start
        for first, size, file, _ in self._ranges.get(f"{kind}/{name}", []):
            low, high = max(at, first), min(start + numel, first + size)
            if low != at or high <= low:
                continue
            out[low - start : high - start] = file.get_slice(f"{kind}/{name}")[low - first : high - first]
            at = high
        if at < start + numel:
            raise UserError(f"checkpoint {self.folder}: {kind} of {name} has no element {at} of {start + numel}")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a whole tensor in its shape, float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)


def sha256(path: Path) -> str:
    """Return the checksum of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_architecture(found: Config, wanted: Config, where: str) -> None:
    """Raise UserError naming the first field in which a checkpoint's model differs from the configuration's."""
    for field in ARCHITECTURE_FIELDS:
        theirs, ours = getattr(found.model, field), getattr(wanted.model, field)
        if theirs != ours:
            raise UserError(
                f"model.{field}: the checkpoint in {where} has {theirs}, this configuration gives {ours}; "
                "use the checkpoint's configuration or another run.dir"
            )
    if (found.edge.weight > 0) != (wanted.edge.weight > 0) or found.edge.channels != wanted.edge.channels:
        raise UserError(f"edge: the checkpoint in {where} has other edge modules; keep edge.weight and edge.channels")


def newest(root: Path) -> list[Path]:
    """Return the finished checkpoint folders below `root`, the newest first."""
    return sorted((p for p in root.glob("step-*") if (p / MANIFEST).is_file()), reverse=True)


def open_newest(path: Path) -> CheckpointReader:
    """Open a checkpoint folder, or the newest of a run directory that verifies. UserError when there is none."""
    if (path / MANIFEST).is_file():
        folders = [path]
    else:
        folders = newest(path / "checkpoints") or newest(path)
    problems = []
    for folder in folders:
        try:
            reader = CheckpointReader(folder)
            damage = reader.damage()
        except UserError as error:
            damage = str(error)
        if damage is None:
            return reader
        problems.append(f"{folder.name}: {damage}")
    found = f"; damaged: {'; '.join(problems)}" if problems else ""
    raise UserError(f"--checkpoint {path}: no checkpoint there{found}; give a run directory or one of its step-* folders")
