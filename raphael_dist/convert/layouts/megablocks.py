"""The layout `megablocks`: weights with the names and shapes of MegaBlocks' grouped feed-forward layers (dMoE).

For a layer of K experts of width F and D channels, the names begin with `....space_moe` or `....time_moe`:

    .experts.mlp.w1 [K F, D]    rows of expert k are its first layer:        x @ w1_k^T
    .experts.mlp.w2 [K F, D]    expert k's second layer, transposed:         act(...) @ w2_k
    .experts.mlp.v1 [K F, D]    only with GEGLU: act(x @ w1_k^T) * (x @ v1_k^T)
    .experts.b1 [K, F'], .experts.b2 [K, D]    biases, unchanged (F' = 2 F with GEGLU, else F); MegaBlocks has none

All other tensors keep their names. Matrices are float32 by default; MegaBlocks' kernels require --dtype bfloat16.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import Shapes, Span, stacked
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import base_manifest, checkpoint_of
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import FileTensor, entries, gather, locate
from raphael_dist.convert.source_checkpoint import Checkpoint, parameter_shapes
from raphael_dist.convert.write_plan import ConversionPlan, Options, Source, chosen_weights, parts
from raphael_dist.errors import UserError
from raphael_dist.storage.weight_files import weight_files

STEM = "model"


def tensors(shapes: Shapes, gated: bool) -> Iterator[FileTensor]:
    """Yield every tensor that a model has in the format of MegaBlocks.

    Args:
        shapes: shape of every parameter of the model, by name.
        gated: whether the time experts use GEGLU.
    """
    for name, shape in shapes.items():
        layer, leaf = stacked(name) or (name, "")
        if leaf not in ("w1", "w2"):
            yield FileTensor(f"{layer}.experts.{leaf}" if leaf else name, shape, [Span(name, 0, prod(shape))])
            continue
        experts, rows, columns = shape
        each, half, key = rows * columns, rows * columns // 2, f"{layer}.experts.mlp"
        spans = [Span(name, k * each, each) for k in range(experts)]
        if leaf == "w2":
            yield FileTensor(f"{key}.w2", (experts * columns, rows), spans, rows)
        elif gated and layer.endswith("time_moe"):
            # GEGLU's fused projection has the rows of the value first, then those of the gate; MegaBlocks activates w1.
            yield FileTensor(f"{key}.w1", (experts * rows // 2, columns), [Span(name, s.start + half, half) for s in spans])
            yield FileTensor(f"{key}.v1", (experts * rows // 2, columns), [Span(name, s.start, half) for s in spans])
        else:
            yield FileTensor(f"{key}.w1", (experts * rows, columns), spans)


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to a folder with weights in the format of MegaBlocks (the library's dMoE).

    `options`: which weights to write, their dtype, and the largest size of a file. `target` is not used: the paths in the
    plan are relative to it. Raises UserError for a model without experts.
    """
    model = source.config.model
    if not (model.space_experts or model.time_experts):
        raise UserError(
            "--to megablocks requires a model with experts, but this model has none. Use --to canonical or --to diffusers."
        )
    kind = chosen_weights(source, options)
    expected = tensors(source.shapes, model.time_activation == "geglu")
    files, small = parts(entries(expected, kind, options.dtype), STEM, options.part_bytes)
    manifest = base_manifest("megablocks", source) | {"weights": kind}
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small)


def open_megablocks(folder: Path, config: Config | None = None) -> Checkpoint:
    """Open a folder with weights in the format of MegaBlocks that this project has written. Only headers are read.

    `config` is not used, since the folder's manifest has the configuration.
    Raises UserError for a missing or unexpected tensor, or a wrong shape.
    """
    manifest = read_manifest(folder / MANIFEST, "megablocks")
    config = config_from_tree(manifest["config"])
    expected = tensors(parameter_shapes(config), config.model.time_activation == "geglu")
    located = locate(gather(weight_files(folder, (STEM, STEM)).paths), expected)
    return checkpoint_of(folder, manifest, {("master", name): stored for name, stored in located.items()})


LAYOUT = Layout("megablocks", "weights", lambda path: False, open_megablocks, plan, WEIGHTS)
