"""What a conversion will write, decided before anything is read: files of entries, entries of stretches of source tensors.

A layout as a target is a function from a checkpoint to a Plan. Since the plan says where every element goes, that nothing is
lost or written twice is checked on it, without data; and ranks divide it by files.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raphael_dist.config import Config
from raphael_dist.convert.source import chunks, describe
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import CHUNK, HashedFile, write_safetensors
from raphael_dist.storage.torchfile import Lazy, write_tree

ZEROS = "zeros"  # the kind of padding, and of moments that the source does not have
STEP = "step"  # the kind of a single number, given as `start`: the optimizer's count of steps
PART_BYTES = 5 << 30


class Source(Protocol):
    """What a plan reads from: a `state.Checkpoint`, or something that makes its tensors up."""

    path: Path
    config: Config
    step: int
    samples_seen: int
    dataset: str
    updates: int | None
    guard: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def whole(self) -> bool:
        """Whether nothing that its run had is left out."""

    def kinds(self) -> tuple[str, ...]: ...

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor: ...


def resumes(source: Source) -> bool:
    """Return whether a run can go on from the source: it has the moments, or its run has none (SGD; before any update)."""
    stateless = source.config.optim.kind == "sgd" or not source.updates
    return all(kind in source.kinds() for kind in MOMENTS) or (source.whole and stateless)


@dataclass(frozen=True)
class Take:
    """Elements [start, start + numel) of the source's tensor (kind, name); `rows`: a matrix of so many rows, transposed.

    copy: these elements are written elsewhere too, where they count.
    """

    kind: str
    name: str
    start: int
    numel: int
    rows: int = 0
    copy: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, put together from stretches in order."""

    key: str
    shape: tuple[int, ...]
    takes: tuple[Take, ...]
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
    """How the target is to be: topology (run and deepspeed), which weights and in what type (layouts of weights
    alone), whether a pipeline is left without its encoders."""

    space_ep: int = 1
    time_ep: int = 1
    world: int = 1
    stage: int = 1
    weights: str | None = None
    dtype: torch.dtype = torch.float32
    part_bytes: int = PART_BYTES
    unet_only: bool = False


@dataclass
class Plan:
    """All files of a conversion. `manifest`: its contents but for the checksums, and where it goes; `small`: other files.

    kinds: what is carried over. notes: what is not, in words. finish: last touches in the finished folder, on one rank.
    """

    layout: str
    files: list[OutFile]
    kinds: tuple[str, ...]
    manifest_name: str
    manifest: dict[str, Any]
    small: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[Path], None] | None = None


def check_complete(plan: Plan, source: Source) -> None:
    """Raise UserError unless every element of every kind that the plan carries is written exactly once."""
    found = defaultdict(list)
    for take in (take for file in plan.files for entry in file.entries for take in entry.takes):
        if take.kind not in (ZEROS, STEP) and not take.copy:
            found[take.kind, take.name].append((take.start, take.numel))
    for kind in plan.kinds:
        for name, shape in source.shapes.items():
            at = 0
            for start, numel in sorted(found.pop((kind, name), [])):
                if start != at:
                    raise UserError(f"{kind} of {describe(name, shape, min(at, start))} would not be written once")
                at += numel
            if at != prod(shape):
                raise UserError(f"{kind} of {describe(name, shape, at)} would not be written")
    if found:
        raise UserError(f"{next(iter(found))} would be written, but is not to be carried over")
    for entry in (entry for file in plan.files for entry in file.entries):
        assert sum(t.numel for t in entry.takes) == prod(entry.shape), entry.key


def values(entry: Entry, source: Source) -> Iterator[Tensor]:
    """Yield the elements of an entry in order, in its dtype, in pieces of bounded size."""
    for take in entry.takes:
        if take.rows:
            matrix = source.read(take.kind, take.name, take.start, take.numel).view(take.rows, -1)
            yield matrix.t().to(entry.dtype).contiguous()
            continue
        if take.kind == STEP:
            yield torch.tensor([float(take.start)], dtype=entry.dtype)
            continue
        for start, numel in chunks(take.start, take.numel, CHUNK):
            if take.kind == ZEROS:
                yield torch.zeros(numel, dtype=entry.dtype)
            else:
                yield source.read(take.kind, take.name, start, numel).to(entry.dtype)


def write_file(file: OutFile, folder: Path, source: Source) -> HashedFile:
    """Write one file below `folder`; the result's `entry` waits until it is durable."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashedFile(path) as out:
        if file.tree is not None:
            write_tree(out, _lazy(file.tree, source))
        else:
            heads = [(e.key, e.dtype, e.shape) for e in file.entries]
            write_safetensors(out, heads, file.metadata, (v for e in file.entries for v in values(e, source)))
    return out


def _lazy(node: Any, source: Source) -> Any:
    if isinstance(node, Entry):
        return Lazy(node.dtype, node.shape, lambda: values(node, source))
    if type(node) in (dict, list) or type(node).__name__ == "OrderedDict":
        items = node.items() if isinstance(node, dict) else enumerate(node)
        made = [(key, _lazy(value, source)) for key, value in items]
        return type(node)(made) if isinstance(node, dict) else [value for _, value in made]
    return node


def entries_of(tree: Any) -> Iterator[Entry]:
    """Yield the entries in a tree of dicts and lists."""
    if isinstance(tree, Entry):
        yield tree
    elif isinstance(tree, dict | list):
        for node in tree.values() if isinstance(tree, dict) else tree:
            yield from entries_of(node)


def parts(entries: Iterable[Entry], stem: str, part_bytes: int) -> list[OutFile]:
    """Divide entries over STEM-00001-of-00003.safetensors of about `part_bytes`; one part alone is STEM.safetensors."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    if len(groups) == 1:
        return [OutFile(f"{stem}.safetensors", tuple(groups[0]), {"format": "pt"})]
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [OutFile(name, tuple(group), {"format": "pt"}) for name, group in zip(names, groups, strict=True)]


def index_json(files: list[OutFile]) -> bytes:
    """Return the index that says which part holds which key, as Hugging Face's libraries read it."""
    import json

    weight_map = {e.key: Path(f.name).name for f in files for e in f.entries}
    total = sum(f.bytes for f in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def chosen_weights(source: Source, options: Options) -> str:
    """Return the kind that a layout of weights alone takes: what was asked for, else the averaged ones if there are any."""
    wanted = options.weights or ("ema" if "ema" in source.kinds() else "master")
    if wanted not in source.kinds():
        raise UserError(f"--weights {wanted}: {source.path} holds only {', '.join(source.kinds())}")
    return wanted
