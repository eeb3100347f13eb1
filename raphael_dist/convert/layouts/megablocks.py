"""The layout of MegaBlocks' grouped feed-forward layers: stacked matrices of [experts x width, dim], weights alone.

For a layer of K experts of width F and D channels, with `....space_moe` or `....time_moe` in front:

    .experts.mlp.w1 [K F, D]    rows of expert k are its first layer:        x @ w1_k^T
    .experts.mlp.w2 [K F, D]    expert k's second layer, transposed:         act(...) @ w2_k
    .experts.mlp.v1 [K F, D]    with GEGLU alone: act(x @ w1_k^T) * (x @ v1_k^T)
    .experts.b1 [K, F'], .experts.b2 [K, D]    biases, which its layers do not have, as they are here

Everything else keeps its name. Matrices are float32 by default; --dtype bfloat16 is what its kernels take.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from raphael_dist.config import config_from_tree
from raphael_dist.convert.layouts.canonical import gather_indexed
from raphael_dist.convert.layouts.dense import left_out
from raphael_dist.convert.manifest import base_manifest, read_manifest, vouched
from raphael_dist.convert.plan import Entry, Options, Plan, Source, Take, chosen_weights, index_json, parts
from raphael_dist.convert.source import Checkpoint, Range, parameter_shapes, stacked
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import Stored

STEM = "model"


def matrices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], list[tuple[int, int]], bool]]:
    """Yield (key, shape, stretches (start, numel) of the parameter in order, whether each is transposed)."""
    found = stacked(name)
    if found is None:
        yield name, shape, [(0, prod(shape))], False
        return
    layer, leaf = found
    if leaf in ("b1", "b2"):
        yield f"{layer}.experts.{leaf}", shape, [(0, prod(shape))], False
        return
    experts, rows, columns = shape
    each = rows * columns
    yield f"{layer}.experts.mlp.{leaf}", _stack(leaf, shape), [(k * each, each) for k in range(experts)], leaf == "w2"


def _stack(leaf: str, shape: tuple[int, ...]) -> tuple[int, int]:
    experts, rows, columns = shape
    return (experts * columns, rows) if leaf == "w2" else (experts * rows, columns)


def _all(shapes: dict[str, tuple[int, ...]], gated: bool) -> Iterator[tuple[str, str, tuple[int, ...], list, bool]]:
    """Yield (parameter, key, shape, stretches, transposed) of every tensor of the layout."""
    for name, shape in shapes.items():
        for key, whole, stretches, transposed in matrices(name, shape):
            if not (gated and key.endswith("time_moe.experts.mlp.w1")):
                yield name, key, whole, stretches, transposed
                continue
            # GEGLU's fused projection holds the value's rows first, then the gate's; MegaBlocks activates w1.
            half, rows = stretches[0][1] // 2, whole[0] // 2
            yield name, key, (rows, whole[1]), [(start + half, half) for start, _ in stretches], False
            yield name, key[:-2] + "v1", (rows, whole[1]), [(start, half) for start, _ in stretches], False


def plan(source: Source, options: Options) -> Plan:
    """Plan a folder of stacked weights. UserError for a model without experts."""
    model = source.config.model
    if not (model.space_experts or model.time_experts):
        raise UserError("--to megablocks: the model has no experts; use canonical or diffusers")
    kind = chosen_weights(source, options)
    entries = []
    for name, key, whole, stretches, transposed in _all(source.shapes, model.time_activation == "geglu"):
        rows = source.shapes[name][1] if transposed else 0
        takes = tuple(Take(kind, name, start, numel, rows) for start, numel in stretches)
        entries.append(Entry(key, whole, takes, options.dtype))
    files = parts(entries, STEM, options.part_bytes)
    manifest = base_manifest("megablocks", source) | {"weights": kind}
    small = {f"{STEM}.safetensors.index.json": index_json(files)}
    return Plan("megablocks", files, (kind,), "manifest.json", manifest, small, left_out(source, kind))


def open_megablocks(folder: Path) -> Checkpoint:
    """Open a folder that `plan` describes. UserError for a missing, extra or misshapen tensor."""
    manifest = read_manifest(folder / "manifest.json", "megablocks")
    config = config_from_tree(manifest["config"])
    shapes, stored = parameter_shapes(config), gather_indexed(folder, STEM)
    ranges: dict[tuple[str, str], list[Range]] = {}
    for name, key, whole, stretches, transposed in _all(shapes, config.model.time_activation == "geglu"):
        found = stored.pop(key, None)
        if found is None:
            raise UserError(f"{folder}: {key} is missing")
        if found.shape != whole:
            raise UserError(
                f"{folder}: {key} has shape {list(found.shape)}, the model wants {list(whole)}: another number of experts?"
            )
        at = found.offset
        for start, numel in stretches:
            shape = (shapes[name][2], shapes[name][1]) if transposed else (numel,)
            part = Stored(found.path, at, found.dtype, shape)
            ranges.setdefault(("master", name), []).append(Range(start, part, transposed))
            at += numel * found.dtype.itemsize
    if stored:
        raise UserError(f"{folder}: {next(iter(stored))} is no tensor of this configuration's model")
    found_all = Checkpoint("megablocks", folder, config, int(manifest["step"]), int(manifest["samples_seen"]),
                           manifest["dataset"], ranges, vouched(folder, manifest))  # fmt: skip
    found_all.check()
    return found_all
