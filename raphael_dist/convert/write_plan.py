"""The plan of a conversion, made before data is read: files of entries, entries of pieces of the source.

A layout makes the plan for its target. The plan says where every element goes. So it can be checked without data that
nothing is lost or written twice, and its files can be divided over ranks.
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
from raphael_dist.checkpoint.tensors import Span, coverage_error, default_weights
from raphael_dist.config.schema import Config
from raphael_dist.convert.source_checkpoint import chunks
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile, write_safetensors
from raphael_dist.storage.torchfile import write_tree
from raphael_dist.text import JsonObject

ZEROS = "zeros"  # the kind of padding, and of moments that the source lacks
STEP = "step"  # the kind of a single number, the optimizer's step, which is the span's `start`
PART_BYTES = 5 << 30


class Source(Protocol):
    """What a plan reads from: a `Checkpoint`, or tensors that are computed when they are read, as in `UpcycledSource`."""

    path: Path
    config: Config
    progress: Progress
    dataset: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def whole(self) -> bool:
        """Whether it holds the whole state of its run."""

    def kinds(self) -> tuple[str, ...]: ...

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor: ...


def progress_of_target(source: Source) -> tuple[Progress, list[str]]:
    """Return the progress of a run that continues from the source, and a note if it starts at step 0.

    It continues if the source has the moments, or its run has none (with SGD, or before the first update).
    """
    stateless = source.config.optim.kind == "sgd" or not source.progress.updates
    if all(kind in source.kinds() for kind in MOMENTS) or (source.whole and stateless):
        return source.progress, []
    return START, [
        "the source has no Adam moments (exp_avg, exp_avg_sq): the target starts at step 0 with zeros, like a new run"
    ]


@dataclass(frozen=True)
class Piece:
    """A span of one kind of the source's values, as it is written into a file.

    Attributes:
        rows: if not 0, the span is a matrix of this many rows, and is written transposed.
        duplicate: these elements are also written elsewhere; the check that each is written once ignores this piece.
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
    """One tensor of a file: the concatenation of its pieces."""

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutFile:
    """A file to write: safetensors, or, with a tree that holds the entries, a file of torch.save.

    Attributes:
        name: path below the target.
        tree: a JSON-like tree of dicts and lists; None for safetensors.
    """

    name: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    tree: Any = None

    @property
    def bytes(self) -> int:
        return sum(e.bytes for e in self.entries)


@dataclass(frozen=True)
class Options:
    """Options of a conversion. `Layout.options` lists those that a layout supports.

    Attributes:
        space_ep, time_ep: ranks over which experts are sharded. world: number of ranks. stage: ZeRO stage.
        weights: "master" or "ema", for layouts that hold one kind; None: the EMA if there is one. dtype: of its values.
        part_bytes: size at which weights are divided into several files.
        unet_only: leave the encoders out of a pipeline.
        text_by_name: store the name of a text encoder instead of a copy. For "characters" only the name is stored in any
            case.
        licence: licence in the model card of a pipeline.
        prediction: prediction type of the source's model, if its files do not state it.
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
    """Everything that a conversion writes.

    Attributes:
        files: files with tensors, which are divided over the ranks.
        kinds: the kinds of values that are written.
        manifest_name: path of the manifest below the target. manifest: its content except the files.
        small: content of other files, by path below the target.
        notes: lines for the user.
        finish: writes other parts into the folder, on one rank, before the manifest.
    """

    files: list[OutFile]
    kinds: tuple[str, ...]
    manifest_name: str
    manifest: JsonObject
    small: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[Path], None] | None = None


def check_complete(plan: ConversionPlan, source: Source) -> None:
    """Raise UserError unless every element of every kind of the plan is written exactly once."""
    spans = defaultdict(list)
    for entry in (entry for file in plan.files for entry in file.entries):
        assert sum(p.span.numel for p in entry.pieces) == prod(entry.shape), entry.key
        for p in entry.pieces:
            if p.kind not in (ZEROS, STEP) and not p.duplicate:
                spans[p.kind, p.span.name].append((p.span.start, p.span.numel))
    problem = coverage_error(spans, plan.kinds, source.shapes)
    if problem:
        raise UserError(f"--to: the target must contain each tensor exactly once, but {problem}. Use another target layout.")


def values(entry: Entry, source: Source) -> Iterator[Tensor]:
    """Yield the elements of an entry in order, in its dtype, in blocks of bounded size."""
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
    """Write one file below `folder`. `entry` of the result waits until the file is synced."""
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
    """Divide entries over files STEM-00001-of-00003.safetensors of about `part_bytes`, or STEM.safetensors if one is enough.

    Returns:
        The files, and the content of the index STEM.safetensors.index.json by its name (empty for one file), as Hugging
        Face's libraries read it.
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
    """Return the kind of weights for a layout that holds one kind: that of --weights, else the EMA if there is one."""
    kind = options.weights or default_weights(source.kinds())
    if kind not in source.kinds():
        raise UserError(
            f"--weights {kind} must be one of {', '.join(source.kinds())}, the kinds of weights in {source.path}. Change it."
        )
    return kind
