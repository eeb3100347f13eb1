"""Looks at a checkpoint: what it is, whether it verifies, and whether its experts are alive and different."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.config import Config
from raphael_dist.convert.layouts import detect, open_checkpoint
from raphael_dist.convert.manifest import vouched
from raphael_dist.convert.source import Checkpoint
from raphael_dist.errors import UserError
from raphael_dist.storage.files import damage

_SAMPLE = 1 << 16  # elements by which two experts are compared first


@dataclass(frozen=True)
class Layer:
    """The experts of one layer: norms of their weights, and those that are dead (all zero) or equal to an earlier one."""

    name: str
    norms: list[float]
    dead: list[int]
    same: list[tuple[int, int]]
    not_finite: list[int]

    @property
    def warnings(self) -> list[str]:
        """Return what is wrong, in words."""
        texts = [f"expert {k} is dead: all its weights are zero" for k in self.dead]
        texts += [f"experts {a} and {b} are identical" for a, b in self.same]
        return texts + [f"expert {k} is not finite" for k in self.not_finite]


def open_for_inspection(path: Path, unpickle: bool, config: Config | None) -> Checkpoint:
    """Open a checkpoint. UserError for pickles that no manifest vouches for, unless `unpickle`; weights_only in any case."""
    if not unpickle and path.exists():
        layout = detect(path)
        pickles = layout.pickles(path)
        if pickles:
            _refuse_unvouched(path, pickles, layout.name)
    return open_checkpoint("auto", path, config)


def _refuse_unvouched(path: Path, pickles: list[Path], layout: str) -> None:
    manifest = pickles[0].parent / MANIFEST
    if path.is_file() or not manifest.is_file():
        raise UserError(
            f"{path}: {pickles[0].name} is a pickle that no manifest vouches for; --unpickle reads it as weights alone"
        )
    files = vouched(manifest.parent, read_manifest(manifest, layout))
    for pickle in pickles:
        if pickle not in files:
            raise UserError(
                f"{pickle} is a pickle that the manifest does not vouch for; --unpickle reads it as weights alone"
            )
        if wrong := damage([(pickle, files[pickle])]):
            raise UserError(
                f"{wrong}; a pickle that is not the manifest's is not opened (--unpickle reads it as weights alone)"
            )


def layers(checkpoint: Checkpoint) -> Iterator[Layer]:
    """Yield what the experts of each layer look like, one expert's tensor in memory at a time."""
    kind = "master" if "master" in checkpoint.kinds() else checkpoint.kinds()[0]
    for layer in dict.fromkeys(owner[0] for name in checkpoint.shapes if (owner := stacked(name))):
        names = [f"{layer}.{leaf}" for leaf in ("w1", "b1", "w2", "b2")]
        num_experts = checkpoint.shapes[names[0]][0]
        norms, heads = [], []
        for k in range(num_experts):
            square = 0.0
            for name in names:
                each = prod(checkpoint.shapes[name][1:])
                square += float(checkpoint.read(kind, name, k * each, each).double().square().sum())
            norms.append(square**0.5)
            heads.append([_head(checkpoint, kind, name, k) for name in names])
        same = [
            (a, b)
            for b in range(num_experts)
            for a in range(b)
            if norms[a] == norms[b] > 0 and all(torch.equal(x, y) for x, y in zip(heads[a], heads[b], strict=True))
        ]
        dead = [k for k, norm in enumerate(norms) if norm == 0]
        yield Layer(layer, norms, dead, same, [k for k, n in enumerate(norms) if not n < float("inf")])


def _head(checkpoint: Checkpoint, kind: str, name: str, k: int) -> torch.Tensor:
    each = prod(checkpoint.shapes[name][1:])
    return checkpoint.read(kind, name, k * each, min(each, _SAMPLE))


def show(checkpoint: Checkpoint) -> bool:
    """Print everything about a checkpoint; return whether it verifies (or nothing vouches for it) and warnings are none."""
    # Where nobody sees its edge, as in a pipe, no name is cut off.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    total = sum(prod(shape) for shape in checkpoint.shapes.values())
    progress = f"step {checkpoint.progress.step}, {checkpoint.progress.samples_seen:,} samples seen"
    console.print(f"{checkpoint.path}: layout {checkpoint.layout}, {progress}")
    if checkpoint.topology:
        console.print(f"written by {checkpoint.topology}")
    m = checkpoint.config.model
    console.print(f"channels {list(m.channels)}, {m.space_experts} space experts, {m.time_experts} time experts")
    for kind in checkpoint.kinds():
        console.print(f"  {kind}: {len(checkpoint.shapes):,} tensors, {total:,} parameters")
    for note in checkpoint.notes:
        console.print(f"[bold red]{note}[/]")
    sound = _show_experts(checkpoint, console)
    wrong = checkpoint.damage()
    if not checkpoint.files:
        console.print("no manifest: sizes and checksums cannot be verified; every tensor is there once")
    elif wrong is None:
        console.print(f"verified: {len(checkpoint.files)} files agree with the manifest")
    else:
        console.print(f"[bold red]damaged:[/] {wrong}")
    return sound and wrong is None


def _show_experts(checkpoint: Checkpoint, console: Console) -> bool:
    table = Table(Column("layer", no_wrap=True, overflow="fold"), "experts", "smallest norm", "largest norm", "warnings")
    sound, rows = True, 0
    for layer in layers(checkpoint):
        short = layer.name.replace("transformer_blocks.0.", "")
        warnings = "; ".join(layer.warnings)
        sound, rows = sound and not warnings, rows + 1
        table.add_row(
            short, str(len(layer.norms)), f"{min(layer.norms):.4g}", f"{max(layer.norms):.4g}", f"[red]{warnings}[/]"
        )
    if rows:
        console.print(table)
    return sound
