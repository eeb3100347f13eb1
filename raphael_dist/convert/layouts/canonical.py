"""The layout `canonical`: safetensors with whole tensors; each expert has tensors of its own, stored as in nn.Linear.

    manifest.json
    model-00001-of-00003.safetensors ... model.safetensors.index.json      fp32 weights
    exp_avg-*, exp_avg_sq-*                                                Adam's moments, under the same keys
    ema-*                                                                  moving average, under the same keys

Expert 3 of a Space-MoE is `....space_moe.experts.3.w1.weight` [F, D], `.w1.bias`, `.w2.weight` [D, F], `.w2.bias`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from raphael_dist.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from raphael_dist.checkpoint.tensors import KINDS, Key, Shapes, Span, stacked
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import base_manifest, checkpoint_of
from raphael_dist.convert.layouts import Layout
from raphael_dist.convert.source_checkpoint import Checkpoint, parameter_shapes
from raphael_dist.convert.write_plan import ConversionPlan, Entry, Options, OutFile, Piece, Source, parts
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import file_tensors

STEMS = {"master": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "ema": "ema"}
_LEAVES = {"w1": "w1.weight", "b1": "w1.bias", "w2": "w2.weight", "b2": "w2.bias"}


class FileTensor(NamedTuple):
    """A tensor in a file, and the elements of the trainer's parameters that it consists of.

    Attributes:
        key: name of the tensor in the file.
        shape: shape of the tensor in the file.
        spans: ranges of elements of flattened parameters, all of the same length, whose concatenation is the tensor.
        rows: if not 0, each span is a matrix of this many rows, and its transpose is stored.
    """

    key: str
    shape: tuple[int, ...]
    spans: list[Span]
    rows: int = 0


def tensors(shapes: Shapes) -> Iterator[FileTensor]:
    """Yield each tensor that the layout `canonical` stores for one kind of values: weights, an Adam moment or the EMA.

    A parameter of K stacked experts is stored as K tensors, one per expert; any other parameter as one tensor.
    `shapes`: shape of every parameter of the model, by name.
    """
    for name, shape in shapes.items():
        owner = stacked(name)
        if owner is None:
            yield FileTensor(name, shape, [Span(name, 0, prod(shape))])
            continue
        each = prod(shape[1:])
        for k in range(shape[0]):
            yield FileTensor(f"{owner[0]}.experts.{k}.{_LEAVES[owner[1]]}", shape[1:], [Span(name, k * each, each)])


def entries(expected: Iterable[FileTensor], kind: str, dtype: torch.dtype = torch.float32) -> Iterator[Entry]:
    """Yield an `Entry` for each tensor of `expected`: name, shape, dtype, and where its values are read. It holds no values.

    `dtype`: the dtype in which the tensors are to be written. `kind`: which values are to be written: "master" (fp32
    weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema".
    """
    for key, shape, spans, rows in expected:
        yield Entry(key, shape, tuple(Piece(kind, span, rows) for span in spans), dtype)


def locate(stored: Mapping[str, StoredTensor], expected: Iterable[FileTensor]) -> dict[str, list[StoredTensor]]:
    """Return where the values of each parameter are in files, by the parameter's name. A tensor may be missing.

    Args:
        stored: where each tensor is in its file, by the tensor's name.
        expected: the tensors that the files should have.

    Raises:
        UserError: a tensor is not among `expected`, or has another shape.
    """
    by_key = {tensor.key: tensor for tensor in expected}
    located: dict[str, list[StoredTensor]] = defaultdict(list)
    for key, tensor in stored.items():
        if key not in by_key:
            raise UserError(
                f"{tensor.path} contains {key}, which is not a tensor of the model that the manifest describes. "
                "Convert the checkpoint again, or use another one."
            )
        _, shape, spans, rows = by_key[key]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: {key} must have the shape {list(shape)}, but it has {list(tensor.shape)}. Convert the "
                "checkpoint again, or use another one."
            )
        for i, span in enumerate(spans):
            part = tensor.part(i * span.numel, span.numel, span.start)
            if rows:
                part = replace(part, shape=(span.numel // rows, rows), transposed=True)
            located[span.name].append(part)
    return located


def kind_files(source: Source, kind: str, part_bytes: int) -> tuple[list[OutFile], dict[str, bytes]]:
    """Plan the safetensors files for one kind of values of the checkpoint `source`.

    A file has at most `part_bytes` bytes of tensors, unless a single tensor is larger.

    `kind`: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema". Returns the planned files, and
    {name: content} of the index, a file that states which tensor is in which file; {} if there is only one file.
    """
    return parts(entries(tensors(source.shapes), kind), STEMS[kind], part_bytes)


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to the layout `canonical`: safetensors files with whole tensors.

    The plan has all kinds of values that the source has: weights, Adam moments and EMA. Of `options`, only `part_bytes`
    is used: the maximum size of a file in bytes, which only a file with a single larger tensor exceeds. `target`, the
    folder to write later, is not used, because the plan names its files relative to it.
    """
    files: list[OutFile] = []
    small: dict[str, bytes] = {}
    for kind in source.kinds():
        of_kind, index = kind_files(source, kind, options.part_bytes)
        files += of_kind
        small |= index
    return ConversionPlan(files, source.kinds(), MANIFEST, base_manifest("canonical", source), small)


def open_canonical(folder: Path, config: Config | None = None) -> Checkpoint:
    """Open a checkpoint folder in the layout `canonical` (safetensors with whole tensors). Only headers of files are read.

    `config` is not used, since the folder's manifest has the configuration.
    Raises UserError if a tensor is missing, unexpected, duplicate, or has another shape than the model requires.
    """
    manifest = read_manifest(folder / MANIFEST, "canonical")
    shapes = parameter_shapes(config_from_tree(manifest["config"]))
    return checkpoint_of(folder, manifest, read_kinds(folder, manifest, shapes))


def read_kinds(folder: Path, manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> dict[Key, list[StoredTensor]]:
    """Return where the values of each (kind, parameter) are in the safetensors files that a checkpoint's manifest lists.

    A kind is "master" (fp32 weights), "exp_avg", "exp_avg_sq" or "ema".

    Args:
        folder: folder of the files, which are in the layout `canonical`.
        manifest: content of the checkpoint's manifest.json.
        shapes: shape of every parameter of the model, by name.

    Raises:
        UserError: a file has an unexpected tensor, or one of another shape.
    """
    files = [f for f in manifest["files"] if f.endswith(".safetensors")]
    spans: dict[Key, list[StoredTensor]] = {}
    for kind in KINDS:
        of_kind = [folder / f for f in files if f.split("-")[0].split(".")[0] == STEMS[kind]]
        located = locate(gather(of_kind), tensors(shapes))
        spans |= {(kind, name): stored for name, stored in located.items()}
    return spans


def gather(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return where the tensors of several weight files are, by name.

    Args:
        paths: the files.

    Raises:
        UserError: a file cannot be read, or two files have a tensor of the same name.
    """
    gathered: dict[str, StoredTensor] = {}
    for path in paths:
        for key, stored in file_tensors(path).items():
            if key in gathered:
                raise UserError(
                    f"The tensor {key} must be in one file only, but it is in {gathered[key].path} and in {stored.path}. "
                    "Move the file that does not belong to this model out of the folder."
                )
            gathered[key] = stored
    return gathered


LAYOUT = Layout("canonical", "everything", lambda path: False, open_canonical, plan)
