"""Inspects a checkpoint: layout, checksums, and experts whose weights are zero, not finite, or those of another expert."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.config.schema import Config
from raphael_dist.convert.layout_manifest import checksummed_files
from raphael_dist.convert.layouts import detect, open_checkpoint
from raphael_dist.convert.source_checkpoint import Checkpoint
from raphael_dist.errors import UserError
from raphael_dist.storage.files import integrity_error
from raphael_dist.text import counted, escape_control

_SAMPLE = 1 << 16  # elements of each tensor by which two experts with equal norms are compared


@dataclass(frozen=True)
class LayerReport:
    """Statistics of the weights of a layer's experts. Experts are numbered from 0.

    Attributes:
        name: name of the layer in the model.
        norms: for each expert, the L2 norm over all of its weights.
        warnings: one line for each expert that is dead (all weights are zero) or has NaN or infinity, and for each pair of
            equal experts.
    """

    name: str
    norms: list[float]
    warnings: list[str]


def open_for_inspection(path: Path, unpickle: bool, config: Config | None) -> Checkpoint:
    """Open a checkpoint in any layout (format on disk) to inspect it.

    Pickle files could run code. They are opened only if their checksums are in the checkpoint's manifest and correct, or if
    `unpickle` is true. In both cases, only weights are unpickled.

    Args:
        path: the checkpoint.
        unpickle: whether to open pickle files without a correct checksum, too.
        config: the configuration of the model, for checkpoints whose files do not describe it; otherwise None.

    Raises:
        UserError: the checkpoint cannot be read, or `unpickle` is false and a pickle file has no correct checksum.
    """
    if not unpickle and path.exists():
        layout = detect(path)
        pickles = layout.pickles(path)
        if pickles:
            _check_pickles(path, pickles, layout.name)
    return open_checkpoint("auto", path, config)


def _check_pickles(path: Path, pickles: list[Path], layout: str) -> None:
    """Raise UserError unless the manifest of the checkpoint `path` has a correct checksum for each of its pickle files.

    `pickles`: these files. `layout`: name of the layout (format on disk) that the manifest must state.
    """
    manifest = pickles[0].parent / MANIFEST
    is_listed = path.is_dir() and manifest.is_file()
    files = checksummed_files(manifest.parent, read_manifest(manifest, layout)) if is_listed else {}
    for pickle in pickles:
        problem = integrity_error([(pickle, files[pickle])]) if pickle in files else "no manifest has its checksum"
        if problem:
            raise UserError(
                f"{pickle} is a pickle file, which may contain code, and it is not verified ({problem}). So it is not "
                "opened. Add --unpickle to read only the weights in it."
            )


def inspect_layers(checkpoint: Checkpoint) -> Iterator[LayerReport]:
    """Yield a report about the experts' weights for each layer with experts: norms, and zero, equal or non-finite experts.

    The fp32 weights are used, if the checkpoint has them. One tensor of one expert is read at a time.
    """
    kind = "master" if "master" in checkpoint.kinds() else checkpoint.kinds()[0]
    for layer in dict.fromkeys(owner[0] for name in checkpoint.shapes if (owner := stacked(name))):
        names = [f"{layer}.{leaf}" for leaf in ("w1", "b1", "w2", "b2")]
        num_experts = checkpoint.shapes[names[0]][0]
        norms, heads = [], []
        for k in range(num_experts):
            square, head = 0.0, []
            for name in names:
                each = prod(checkpoint.shapes[name][1:])
                values = checkpoint.read(kind, name, k * each, each)
                square += float(values.double().square().sum())
                head.append(values[:_SAMPLE].clone())
            norms.append(square**0.5)
            heads.append(head)
        warnings = [f"expert {k} is dead: all its weights are zero" for k, norm in enumerate(norms) if norm == 0]
        warnings += [
            f"experts {a} and {b} are identical"
            for b in range(num_experts)
            for a in range(b)
            if norms[a] == norms[b] > 0 and all(torch.equal(x, y) for x, y in zip(heads[a], heads[b], strict=True))
        ]
        warnings += [f"expert {k} is not finite" for k, norm in enumerate(norms) if not norm < float("inf")]
        yield LayerReport(layer, norms, warnings)


def show(checkpoint: Checkpoint) -> bool:
    """Print a report about a checkpoint: its model, its experts, and whether its files are intact.

    Returns:
        True if there are no warnings about experts, and all files match the checksums of the manifest. Without a
            manifest, the files are not compared with checksums.
    """
    # Without a terminal the width is unlimited, so that no name is cut off.
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 10_000)
    total = sum(prod(shape) for shape in checkpoint.shapes.values())
    progress = f"step {checkpoint.progress.step}, {counted(checkpoint.progress.samples_seen, 'sample', ',')} seen"
    console.print(escape_control(f"{checkpoint.path}: layout {checkpoint.layout}, {progress}"))
    if checkpoint.topology:
        console.print(escape_control(f"written by {checkpoint.topology}"))
    m = checkpoint.config.model
    experts = f"{counted(m.space_experts, 'space expert')}, {counted(m.time_experts, 'time expert')}"
    console.print(f"channels {list(m.channels)}, {experts}")
    for kind in checkpoint.kinds():
        console.print(f"  {kind}: {counted(len(checkpoint.shapes), 'tensor', ',')}, {total:,} parameters")
    for note in checkpoint.notes:
        console.print(escape_control(note), style="bold red")
    sound = _show_experts(checkpoint, console)
    problem = checkpoint.integrity_error()
    if not checkpoint.files:
        console.print("no manifest: sizes and checksums cannot be verified, but every tensor exists exactly once")
    elif problem is None:
        console.print(f"verified against the manifest: {counted(len(checkpoint.files), 'file')}")
    else:
        console.print(escape_control(f"damaged: {problem}"), style="bold red")
    return sound and problem is None


def _show_experts(checkpoint: Checkpoint, console: Console) -> bool:
    table = Table(Column("layer", no_wrap=True, overflow="fold"), "experts", "smallest norm", "largest norm", "warnings")
    sound, rows = True, 0
    for layer in inspect_layers(checkpoint):
        short = layer.name.replace("transformer_blocks.0.", "")
        warnings = "; ".join(layer.warnings)
        sound, rows = sound and not warnings, rows + 1
        cells = (escape_control(short), str(len(layer.norms)), f"{min(layer.norms):.4g}", f"{max(layer.norms):.4g}")
        table.add_row(*cells, Text(warnings, style="red"))
    if rows:
        console.print(table)
    return sound
