"""The layout `canonical`: safetensors with whole tensors; each expert has tensors of its own, stored as in nn.Linear.

    manifest.json
    model-00001-of-00003.safetensors ... model.safetensors.index.json      fp32 weights
    exp_avg-*, exp_avg_sq-*                                                Adam's moments, under the same keys
    ema-*                                                                  moving average, under the same keys

Expert 3 of a Space-MoE is `....space_moe.experts.3.w1.weight` [F, D], `.w1.bias`, `.w2.weight` [D, F], `.w2.bias`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from raphael_dist.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from raphael_dist.checkpoint.tensors import KINDS, Key, stacked
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import base_manifest, checkpoint_of
from raphael_dist.convert.layouts import Layout
from raphael_dist.convert.source_checkpoint import Checkpoint, parameter_shapes
from raphael_dist.convert.write_plan import ConversionPlan, Entry, Options, OutFile, Source, parts, piece
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import file_tensors

STEMS = {"master": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "ema": "ema"}
_LEAVES = {"w1": "w1.weight", "b1": "w1.bias", "w2": "w2.weight", "b2": "w2.bias"}


def keys(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (key, first element, shape) of each tensor that the layout `canonical` stores for one parameter of the trainer.

    A parameter of K stacked experts is stored as K tensors, one per expert; any other parameter as one tensor. `key` is the
    tensor's name in the file, and `first element` its position in the flattened parameter.

    Args:
        name: name of the parameter in the trainer's model.
        shape: shape of the parameter.
    """
    owner = stacked(name)
    if owner is None:
        yield name, 0, shape
        return
    for k in range(shape[0]):
        yield f"{owner[0]}.experts.{k}.{_LEAVES[owner[1]]}", k * prod(shape[1:]), shape[1:]


def entries(source: Source, kind: str) -> Iterator[Entry]:
    """Yield each tensor to write for one kind of values, with the range of a parameter of `source` that it contains.

    `source`: the checkpoint to convert. `kind`: "master" (fp32 weights), "exp_avg", "exp_avg_sq" or "ema".
    """
    for name, shape in source.shapes.items():
        for key, start, key_shape in keys(name, shape):
            yield Entry(key, key_shape, (piece(kind, name, start, prod(key_shape)),))


def kind_files(source: Source, kind: str, part_bytes: int) -> tuple[list[OutFile], dict[str, bytes]]:
    """Plan the safetensors files for one kind of values of the checkpoint `source`, each of about `part_bytes` bytes.

    `kind`: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema". Returns the planned files, and
    {name: content} of the index, a file that states which tensor is in which file; {} if there is only one file.
    """
    return parts(entries(source, kind), STEMS[kind], part_bytes)


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to the layout `canonical`: safetensors files with whole tensors.

    All kinds of values that the source has are written: weights, Adam moments and EMA. Of `options`, only `part_bytes` is
    used. `target` is not used: the paths in the plan are relative to it.
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
    expected = {key: (name, start, part) for name, shape in shapes.items() for key, start, part in keys(name, shape)}
    files = [f for f in manifest["files"] if f.endswith(".safetensors")]
    spans: dict[Key, list[StoredTensor]] = {}
    for kind in KINDS:
        of_kind = [folder / f for f in files if f.split("-")[0].split(".")[0] == STEMS[kind]]
        for key, stored in gather(of_kind).items():
            if key not in expected:
                raise UserError(
                    f"{stored.path} contains {key}, which is not a tensor of the model that the manifest describes. "
                    "Convert the checkpoint again, or use another one."
                )
            name, start, shape = expected[key]
            if stored.shape != shape:
                raise UserError(
                    f"{stored.path}: {key} must have the shape {list(shape)}, but it has {list(stored.shape)}. Convert the "
                    "checkpoint again, or use another one."
                )
            spans.setdefault((kind, name), []).append(replace(stored, start=start))
    return spans


def gather(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return where the tensors of several weight files are, by name. UserError: two files have a tensor of the same name."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for key, stored in file_tensors(path).items():
            if key in tensors:
                raise UserError(
                    f"The tensor {key} must be in one file only, but it is in {tensors[key].path} and in {stored.path}. "
                    "Move the file that does not belong to this model out of the folder."
                )
            tensors[key] = stored
    return tensors


LAYOUT = Layout("canonical", "everything", lambda path: False, open_canonical, plan)
