"""Reads a checkpoint: its manifest, and any range of any tensor, from whichever files hold it.

A checkpoint is a folder `step-00000100/` with one `rank-00000.safetensors` per rank that wrote it and a `manifest.json`,
written last. Keys are `<kind>/<parameter>`: a flat range of the parameter's fp32 weights (master), Adam moments (exp_avg,
exp_avg_sq) or average (ema). Where a range starts stands in the manifest and in the file's header. Nothing is pickled.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raphael_dist.checkpoint.folders import step_folders
from raphael_dist.config import ARCHITECTURE_FIELDS, Config, config_from_tree
from raphael_dist.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointReader:
    """One checkpoint folder. Raises UserError when its manifest is missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"checkpoint {folder}: no {MANIFEST}; it was never finished") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"checkpoint {folder}: {MANIFEST} is unreadable: {error}") from None
        problem = _malformed(self.manifest)
        if problem:
            raise UserError(f"checkpoint {folder}: {MANIFEST} {problem}")
        unsafe = [name for name in self.manifest["files"] if Path(name).name != name or name.startswith(".")]
        if unsafe:
            raise UserError(f"checkpoint {folder}: {MANIFEST} names a file outside the folder: {unsafe[0]!r}")

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

    def damage(self, files: list[str] | None = None) -> str | None:
        """Return what is wrong with these files (all, by default), or None when sizes and checksums agree."""
        names = self.manifest["files"] if files is None else files
        found = damage((self.folder / name, self.manifest["files"][name]) for name in names)
        return None if found is None else found.removeprefix(f"{self.folder}/")

    def incomplete(self) -> str | None:
        """Return which tensor lacks elements, has some twice or belongs to no parameter; None when all is there once."""
        kinds = self.kinds() | {"master"}
        for key in sorted({f"{kind}/{name}" for kind in kinds for name in self.shapes} | self._ranges.keys()):
            kind, _, name = key.partition("/")
            if name not in self.shapes:
                return f"{key} belongs to no parameter"
            at = 0
            for first, numel, _ in self._ranges.get(key, []):
                if first != at:
                    return f"{kind} of {name} " + (f"has no element {at}" if first > at else f"has element {first} twice")
                at += numel
            if at != torch.Size(self.shapes[name]).numel():
                return f"{kind} of {name} has {at} elements, not {torch.Size(self.shapes[name]).numel()}"
        return None

    @cached_property
    def _ranges(self) -> dict[str, list[tuple[int, int, str]]]:
        """For each key, the (start, numel, file name) of its ranges, in order, by the manifest: no file is opened."""
        ranges = defaultdict(list)
        for name, entry in self.manifest["files"].items():
            for key, (start, numel) in (entry.get("ranges") or self._ranges_in(name)).items():
                ranges[key].append((start, numel, name))
        return {key: sorted(found) for key, found in ranges.items()}

    def _ranges_in(self, name: str) -> dict[str, tuple[int, int]]:
        file = self._file(name)
        try:
            starts = json.loads((file.metadata() or {})["starts"])
            return {key: (int(starts[key]), int(file.get_slice(key).get_shape()[0])) for key in file.keys()}  # noqa: SIM118
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"checkpoint {self.folder}: {name} is unreadable: {error}") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"checkpoint {self.folder}: {name} is unreadable: {error}") from None
        return self._open[name]

    def kinds(self) -> set[str]:
        """Return the kinds of values the checkpoint holds."""
        return {key.partition("/")[0] for key in self._ranges}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32. UserError when any is missing."""
        key, at, parts = f"{kind}/{name}", start, []
        for first, size, file in self._ranges.get(key, []):
            low, high = max(at, first), min(start + numel, first + size)
            if low != at or high <= low:
                continue
            parts.append((low - first, high - first, file))
            at = high
        if at < start + numel:
            raise UserError(f"checkpoint {self.folder}: {kind} of {name} has no element {at} of {start + numel}")
        out = torch.empty(numel)  # only now: a manifest may claim any size
        try:
            found = [self._file(file).get_slice(key)[low:high] for low, high, file in parts]
            if sum(part.numel() for part in found) != numel:
                raise ValueError("the files hold less of it than the manifest says")
            torch.cat(found, out=out)
        except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {self.folder}: {key} cannot be read: {error}") from None
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a whole tensor in its shape, float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the text of a manifest, one key a line, with a checksum of all else in it."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**body, "checksum": _checksum(body)}.items()]
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _malformed(manifest: Any) -> str | None:
    """Return what is wrong with a manifest as such, or None."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"is not of format {FORMAT}"
    lacking = {"step", "samples_seen", "dataset", "config", "tensors", "files"} - manifest.keys()
    if lacking:
        return f"lacks {', '.join(sorted(lacking))}"
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest.get("checksum", _checksum(body)) != _checksum(body):
        return "does not match its own checksum"
    tensors, files = manifest["tensors"], manifest["files"]
    if not isinstance(tensors, dict) or not all(_is_shape(shape) for shape in tensors.values()):
        return "gives a tensor no proper shape"
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    ):
        return "gives a file no size and checksum"
    return None


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def damage(files: Iterable[tuple[Path, dict[str, Any]]]) -> str | None:
    """Return what is wrong with one of the files, compared with its manifest's entry (size, SHA-256), or None."""
    for path, entry in files:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{path} does not match its checksum"
    return None


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
    """Return the checkpoint folders below `root`, the newest first, whole or not. UserError when `root` is unreadable."""
    try:
        return step_folders(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from None


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
