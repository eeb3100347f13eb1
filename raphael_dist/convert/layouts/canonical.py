"""The canonical layout, the hub: safetensors, one key per tensor, experts by global id in the orientation of nn.Linear.

    manifest.json
    model-00001-of-00003.safetensors ... model.safetensors.index.json      fp32 weights
    exp_avg-*, exp_avg_sq-*                                                Adam's moments, under the same keys
    ema-*                                                                  averaged weights, under the same keys

Expert 3 of a Space-MoE is `....space_moe.experts.3.w1.weight` [F, D], `.w1.bias`, `.w2.weight` [D, F], `.w2.bias`.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import KINDS, Key, stacked
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.layouts import Layout
from raphael_dist.convert.manifest import base_manifest, checkpoint_of
from raphael_dist.convert.plan import ConversionPlan, Entry, Options, OutFile, Source, parts, piece
from raphael_dist.convert.source import Checkpoint, parameter_shapes
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import Stored, read_header

STEMS = {"master": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "ema": "ema"}
_LEAVES = {"w1": "w1.weight", "b1": "w1.bias", "w2": "w2.weight", "b2": "w2.bias"}


def keys(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (key, first element, shape) of the tensors that hold a parameter: one per expert, or the parameter itself."""
    owner = stacked(name)
    if owner is None:
        yield name, 0, shape
        return
    for k in range(shape[0]):
        yield f"{owner[0]}.experts.{k}.{_LEAVES[owner[1]]}", k * prod(shape[1:]), shape[1:]


def entries(source: Source, kind: str) -> Iterator[Entry]:
    """Yield the canonical tensors of one kind."""
    for name, shape in source.shapes.items():
        for key, start, one in keys(name, shape):
            yield Entry(key, one, (piece(kind, name, start, prod(one)),))


def kind_files(source: Source, kind: str, part_bytes: int) -> tuple[list[OutFile], dict[str, bytes]]:
    """Return the files of one kind, and the index that belongs to them if there are several."""
    return parts(entries(source, kind), STEMS[kind], part_bytes)


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Plan a canonical folder with everything that the source holds."""
    files: list[OutFile] = []
    small: dict[str, bytes] = {}
    for kind in source.kinds():
        more, index = kind_files(source, kind, options.part_bytes)
        files += more
        small |= index
    return ConversionPlan(files, source.kinds(), MANIFEST, base_manifest("canonical", source), small)


def open_canonical(folder: Path, config: Config | None = None) -> Checkpoint:
    """Open a canonical folder; nothing is read but headers. UserError for a missing, extra, doubled or misshapen tensor."""
    manifest = read_manifest(folder / MANIFEST, "canonical")
    shapes = parameter_shapes(config_from_tree(manifest["config"]))
    return checkpoint_of(folder, manifest, read_kinds(folder, manifest, shapes))


def read_kinds(folder: Path, manifest: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[Key, list[Stored]]:
    """Return the spans of all kinds that the manifest's safetensors files hold, by their canonical keys."""
    wanted = {key: (name, start, one) for name, shape in shapes.items() for key, start, one in keys(name, shape)}
    spans: dict[Key, list[Stored]] = {}
    for kind in KINDS:
        mine = [f for f in manifest["files"] if f.endswith(".safetensors") and f.split("-")[0].split(".")[0] == STEMS[kind]]
        for key, stored in gather(folder, mine).items():
            if key not in wanted:
                raise UserError(f"{stored.path}: {key} is no tensor of this configuration's model, or one expert too many")
            name, start, one = wanted[key]
            if stored.shape != one:
                raise UserError(f"{stored.path}: {key} has shape {list(stored.shape)}, the model wants {list(one)}")
            spans.setdefault((kind, name), []).append(replace(stored, start=start))
    return spans


def gather(folder: Path, names: list[str]) -> dict[str, Stored]:
    """Return the tensors of several safetensors files by key. UserError for a key that is in two of them."""
    tensors: dict[str, Stored] = {}
    for name in names:
        for key, stored in read_header(folder / name)[0].items():
            if key in tensors:
                raise UserError(f"{key} is there twice: in {tensors[key].path} and in {stored.path}")
            tensors[key] = stored
    return tensors


def gather_indexed(folder: Path, stem: str) -> dict[str, Stored]:
    """Return the tensors of STEM.safetensors, or of the parts that STEM.safetensors.index.json names."""
    index, names = folder / f"{stem}.safetensors.index.json", [f"{stem}.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} cannot be read: {error}") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{index} names a file outside its folder")
    return gather(folder, names)


LAYOUT = Layout("canonical", "everything", lambda path: False, open_canonical, plan)
