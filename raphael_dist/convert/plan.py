"""What a conversion will write, decided before anything is read: files of entries, entries of pieces of the source.

A layout as a target is a function from a checkpoint to a ConversionPlan. The plan says where every element goes. So it can
be checked without any data that nothing is lost or written twice; and ranks divide its files among themselves.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import START, Progress
from raphael_dist.checkpoint.tensors import Span, fault
from raphael_dist.config import Config
from raphael_dist.convert.source import chunks
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile, write_safetensors
from raphael_dist.storage.torchfile import write_tree

ZEROS = "zeros"  # the kind of padding, and of moments that the source does not have
STEP = "step"  # the kind of a single number, given as `start`: the optimizer's count of steps
PART_BYTES = 5 << 30


class Source(Protocol):
    """What a plan reads from: a `source.Checkpoint`, or tensors that are made when they are read, as `upcycle.Upcycled`."""

    path: Path
    config: Config
    progress: Progress
    dataset: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def whole(self) -> bool:
        """Whether nothing that its run had is left out."""

    def kinds(self) -> tuple[str, ...]: ...

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor: ...


def progress_of_target(source: Source) -> tuple[Progress, list[str]]:
    """Return how far a run is that goes on from the source, and a note if it has to begin anew.

    It goes on where the moments are there, or where its run has none (SGD; before any update).
    """
    stateless = source.config.optim.kind == "sgd" or not source.progress.updates
    if all(kind in source.kinds() for kind in MOMENTS) or (source.whole and stateless):
        return source.progress, []
    return START, ["exp_avg, exp_avg_sq: not in the source; zero, at step 0, as in a new run"]


@dataclass(frozen=True)
class Piece:
    """A span of the source's values of one kind, as it goes into a file.

    rows: the span is a matrix of so many rows, and is written transposed. duplicate: these elements are written elsewhere
    too; the check that all is written once does not count them here.
    """

    kind: str
    span: Span
    rows: int = 0
    duplicate: bool = False


def piece(kind: str, name: str, start: int, numel: int, rows: int = 0) -> Piece:
    """Return the piece of elements [start, start + numel) of a parameter."""
    return Piece(kind, Span(name, start, numel), rows)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, put together from pieces in order."""

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutFile:
    """A file to write, by its path below the target: safetensors, or (with a tree that holds the entries) torch.save."""

    name: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    tree: Any = None

    @property
    def bytes(self) -> int:
        return sum(e.bytes for e in self.entries)


@dataclass(frozen=True)
class Options:
    """How the target is to be; which of these a layout heeds stands in its `Layout.options`.

    Attributes:
        space_ep, time_ep: ranks that share one set of space and of time experts. world: ranks. stage: of ZeRO.
        weights: "master" or "ema", of layouts that hold one kind. dtype: of its values.
        part_bytes: size at which weights are divided into several files.
        unet_only: a pipeline is left without its encoders.
        licence: what the model card of a pipeline says.
        text_by_name: a text encoder that ships in a package is named instead of copied.
        prediction: what the source's model predicts, where its files do not say.
    """

    space_ep: int = 1
    time_ep: int = 1
    world: int = 1
    stage: int = 1
    weights: str | None = None
    dtype: torch.dtype = torch.float32
    part_bytes: int = PART_BYTES
    unet_only: bool = False
    text_by_name: bool = False
    licence: str = "unknown"
    prediction: str | None = None


@dataclass
class ConversionPlan:
    """All that a conversion writes.

    Attributes:
        files: those with tensors, which the ranks share out.
        kinds: which kinds of values are carried over.
        manifest_name, manifest: where the manifest goes below the target, and what it says but for the files' checksums.
        small: other files, by their paths below the target.
        notes: what the user should know.
        finish: writes what else belongs into the folder, on one rank, before the manifest.
    """

    files: list[OutFile]
    kinds: tuple[str, ...]
    manifest_name: str
    manifest: dict[str, Any]
    small: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[Path], None] | None = None


def check_complete(plan: ConversionPlan, source: Source) -> None:
    """Raise UserError unless every element of every kind that the plan carries is written exactly once."""
    spans = defaultdict(list)
    for entry in (entry for file in plan.files for entry in file.entries):
        assert sum(p.span.numel for p in entry.pieces) == prod(entry.shape), entry.key
        for p in entry.pieces:
            if p.kind not in (ZEROS, STEP) and not p.duplicate:
                spans[p.kind, p.span.name].append((p.span.start, p.span.numel))
    wrong = fault(spans, plan.kinds, source.shapes)
    if wrong:
        raise UserError(f"the target would not hold everything once: {wrong}")


def values(entry: Entry, source: Source) -> Iterator[Tensor]:
    """Yield the elements of an entry in order, in its dtype, in pieces of bounded size."""
    for p in entry.pieces:
        if p.kind == STEP:
            yield torch.tensor([float(p.span.start)], dtype=entry.dtype)
        elif p.rows:
            matrix = source.read(p.kind, p.span.name, p.span.start, p.span.numel).view(p.rows, -1)
            yield matrix.t().to(entry.dtype).contiguous()
        else:
            for start, numel in chunks(p.span.start, p.span.numel):
                zero = p.kind == ZEROS
                yield (torch.zeros(numel) if zero else source.read(p.kind, p.span.name, start, numel)).to(entry.dtype)


def write_file(file: OutFile, folder: Path, source: Source) -> HashedFile:
    """Write one file below `folder`; the result's `entry` waits until it is durable."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(path) as out:
        if file.tree is not None:
            write_tree(out, file.tree, Entry, lambda entry: values(entry, source))
        else:
            heads = [(e.key, e.dtype, e.shape) for e in file.entries]
            write_safetensors(out, heads, file.metadata, (v for e in file.entries for v in values(e, source)))
    return out


def entries_of(tree: Any) -> Iterator[Entry]:
    """Yield the entries in a tree of dicts and lists."""
    if isinstance(tree, Entry):
        yield tree
    elif isinstance(tree, dict | list):
        for node in tree.values() if isinstance(tree, dict) else tree:
            yield from entries_of(node)


def parts(entries: Iterable[Entry], stem: str, part_bytes: int) -> tuple[list[OutFile], dict[str, bytes]]:
    """Divide entries over files STEM-00001-of-00003.safetensors of about `part_bytes`.

    Returns also the index STEM.safetensors.index.json, as Hugging Face's libraries read it, by its name. One part alone is
    STEM.safetensors and needs none.
    """
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    if len(groups) == 1:
        return [OutFile(f"{stem}.safetensors", tuple(groups[0]), {"format": "pt"})], {}
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = [OutFile(name, tuple(group), {"format": "pt"}) for name, group in zip(names, groups, strict=True)]
    index = {
        "metadata": {"total_size": sum(f.bytes for f in files)},
        "weight_map": {e.key: Path(f.name).name for f in files for e in f.entries},
    }
    return files, {f"{stem}.safetensors.index.json": json.dumps(index, indent=1).encode()}


def chosen_weights(source: Source, options: Options) -> str:
    """Return the kind that a layout of weights alone takes: what was asked for, else the averaged ones if there are any."""
    wanted = options.weights or ("ema" if "ema" in source.kinds() else "master")
    if wanted not in source.kinds():
        raise UserError(f"--weights {wanted}: {source.path} holds only {', '.join(source.kinds())}")
    return wanted
