"""The plan of a conversion: which files are written, and which elements of the source each of them contains.

- A *piece* is a range of consecutive elements of one flattened parameter of the source.
- An *entry* is one tensor of a target file: the concatenation of its pieces.
- A file contains entries, and a plan contains files.

The target's layout makes the plan before any values are read. So it can be checked beforehand that every element is written
exactly once, and the files can be divided over ranks.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import START, Progress
from raphael_dist.checkpoint.tensors import Span, coverage_error, default_weights
from raphael_dist.config.schema import Config
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import CHUNK, HashedFile, write_safetensors
from raphael_dist.storage.torchfile import write_tree
from raphael_dist.text import JsonObject

ZEROS = "zeros"  # kind of a piece of zeros: padding, or moments that the source lacks
STEP = "step"  # kind of a piece with one number, the optimizer's step, which is stored in the span's `start`
PART_BYTES = 5 << 30


class Source(Protocol):
    """Interface of the object from which a conversion reads values.

    It is a `Checkpoint`, or an object that computes values from one (`UpcycledSource`, `MergedSource`).
    """

    path: Path
    config: Config
    progress: Progress
    dataset: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def whole(self) -> bool:
        """Whether the source contains everything that its run needs to continue."""

    def kinds(self) -> tuple[str, ...]: ...

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor: ...


def progress_of_target(source: Source) -> tuple[Progress, list[str]]:
    """Return the progress (step, ...) to write into the target of a conversion, and notes for the user.

    The target continues at the source's step if the source has the Adam moments, or if its run has no moments (with SGD, or
    before the first update). Otherwise it starts at step 0, and a note states this.
    """
    stateless = source.config.optim.kind == "sgd" or not source.progress.updates
    if all(kind in source.kinds() for kind in MOMENTS) or (source.whole and stateless):
        return source.progress, []
    return START, [
        "the source has no Adam moments (exp_avg, exp_avg_sq): the target starts at step 0 with zeros, like a new run"
    ]


@dataclass(frozen=True)
class Piece:
    """A range of elements of a parameter, as it is written into a file.

    Attributes:
        kind: kind of the values: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema". ZEROS: zeros, for
            padding or moments that the source lacks. STEP: one number, the optimizer's step, read from `span.start`.
        span: the elements [start, start + numel) of the flattened parameter.
        rows: if not 0, the elements are a matrix of this many rows, which is written transposed.
        duplicate: whether these elements are also written elsewhere. `check_complete` ignores such a piece.
    """

    kind: str
    span: Span
    rows: int = 0
    duplicate: bool = False


def piece(kind: str, name: str, start: int, numel: int) -> Piece:
    """Make a `Piece` of elements [start, start + numel) of the flattened parameter `name`; see `Piece` for kind."""
    return Piece(kind, Span(name, start, numel))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to write.

    Attributes:
        key: name of the tensor in the file.
        shape, dtype: shape and dtype of the tensor in the file.
        pieces: ranges of elements of the source's parameters, whose concatenation is the tensor.
    """

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutFile:
    """A file to write, in the format of safetensors or of torch.save.

    Attributes:
        name: path of the file, relative to the target folder.
        entries: its tensors.
        metadata: metadata of a safetensors file.
        tree: for torch.save, the object to save: nested dicts and lists with an Entry in place of each tensor. None for
            safetensors.
    """

    name: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    tree: object = None

    @property
    def bytes(self) -> int:
        return sum(e.bytes for e in self.entries)


@dataclass(frozen=True)
class Options:
    """Options of a conversion. `Layout.options` lists those that a layout (format on disk) supports.

    Attributes:
        space_ep, time_ep: number of ranks over which the space experts and the time experts are sharded.
        world: number of ranks.
        stage: ZeRO stage.
        weights: "master" (fp32 weights) or "ema", for layouts that contain only one of them. None: the EMA if there is one.
        dtype: dtype of these weights in the target.
        part_bytes: largest size of a weight file in bytes; larger weights are divided over several files.
        unet_only: export only the U-Net of a pipeline, without VAE and text encoder.
        text_by_name: store the name of a text encoder that comes with a package, instead of a copy. The encoder
            "characters" has no files and is always stored by name.
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
        kinds: the kinds of values that are written: "master" (fp32 weights), "exp_avg", "exp_avg_sq" or "ema".
        manifest_name: path of the manifest, relative to the target folder.
        manifest: content of the manifest without the list of files.
        small: content of files without tensors, by path relative to the target folder.
        notes: lines to show to the user.
        finish: called on one rank with the target folder before the manifest is written, e.g. to copy encoders.
    """

    files: list[OutFile]
    kinds: tuple[str, ...]
    manifest_name: str
    manifest: JsonObject
    small: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[Path], None] | None = None


def check_complete(plan: ConversionPlan, source: Source) -> None:
    """Raise UserError unless the files of `plan` contain every element of every parameter of `source` exactly once.

    This is required for each kind of values that the plan contains, such as "master" (fp32 weights).
    """
    spans = defaultdict(list)
    for entry in (entry for file in plan.files for entry in file.entries):
        assert sum(p.span.numel for p in entry.pieces) == prod(entry.shape), entry.key
        for p in entry.pieces:
            if p.kind not in (ZEROS, STEP) and not p.duplicate:
                spans[p.kind, p.span.name].append((p.span.start, p.span.numel))
    problem = coverage_error(spans, plan.kinds, source.shapes)
    if problem:
        raise UserError(
            f"--to: the converted files must contain each weight exactly once, but {problem}. Choose another layout "
            "with --to."
        )


def values(entry: Entry, source: Source) -> Iterator[Tensor]:
    """Read the elements of a planned tensor from the source; yield them in order.

    Each yielded tensor has the dtype of `entry`. It is 1-D with at most 2**20 elements, or a whole matrix that is written
    transposed.
    """
    for p in entry.pieces:
        if p.kind == STEP:
            yield torch.tensor([float(p.span.start)], dtype=entry.dtype)
        elif p.rows:
            matrix = source.read(p.kind, p.span.name, p.span.start, p.span.numel).view(p.rows, -1)
            yield matrix.t().to(entry.dtype).contiguous()
        else:
            end = p.span.start + p.span.numel
            for start in range(p.span.start, end, CHUNK):
                numel, zero = min(CHUNK, end - start), p.kind == ZEROS
                yield (torch.zeros(numel) if zero else source.read(p.kind, p.span.name, start, numel)).to(entry.dtype)


def write_file(file: OutFile, folder: Path, source: Source) -> HashedFile:
    """Write one planned file into `folder`, with values that are read from `source`. Return before fsync has ended.

    The method `entry` of the returned object waits until the file is on the disk, and returns the file's size and SHA-256.
    """
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(path) as out:
        if file.tree is not None:
            write_tree(out, file.tree, Entry, lambda entry: values(entry, source))
        else:
            heads = [(e.key, e.dtype, e.shape) for e in file.entries]
            write_safetensors(out, heads, file.metadata, (v for e in file.entries for v in values(e, source)))
    return out


def entries_of(tree: object) -> Iterator[Entry]:
    """Yield every Entry (planned tensor) in nested dicts and lists."""
    if isinstance(tree, Entry):
        yield tree
    elif isinstance(tree, dict | list):
        for node in tree.values() if isinstance(tree, dict) else tree:
            yield from entries_of(node)


def parts(entries: Iterable[Entry], stem: str, part_bytes: int) -> tuple[list[OutFile], dict[str, bytes]]:
    """Plan in which safetensors files to write tensors. The files are named as Hugging Face does.

    With `stem` = "model" the names are model-00001-of-00003.safetensors, and so on, or model.safetensors if one file is
    enough.

    Args:
        entries: the tensors to write, in order.
        stem: start of the file names; it may contain a folder.
        part_bytes: largest number of bytes of the tensors in a file. A larger tensor gets a file of its own.

    Returns:
        The planned files; and {name: content} of model.safetensors.index.json, which states which tensor is in which file,
        or {} for one file.
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
    """Return which weights a layout (format on disk) gets that can contain only one kind: "ema" or "master" (fp32 weights).

    This is the value of the option --weights (`options.weights`), or without this option the EMA if the source has one.
    Raises UserError if the source lacks this kind of weights.
    """
    kind = options.weights or default_weights(source.kinds())
    if kind not in source.kinds():
        raise UserError(
            f"--weights {kind} must be one of {', '.join(source.kinds())}, the kinds of weights in {source.path}. Leave out "
            f"--weights to write {default_weights(source.kinds())}."
        )
    return kind
