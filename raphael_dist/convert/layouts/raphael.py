"""The layout `raphael`, which the trainer writes: a run directory with checkpoints/step-XXXXXXXX/, one file per rank.

checkpoint/reader.py describes the format. This module plans such files for any number of ranks and any ZeRO stage.
"""

import json
import shlex
from pathlib import Path

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, first_good
from raphael_dist.config.schema import Config, stored_tree, to_yaml
from raphael_dist.convert.layout_manifest import base_manifest, checksummed_files
from raphael_dist.convert.layouts import RANKS, Layout
from raphael_dist.convert.source_checkpoint import Checkpoint
from raphael_dist.convert.write_plan import ZEROS, ConversionPlan, Entry, Options, OutFile, Piece, Source, progress_of_target
from raphael_dist.convert.zero_partition import Topology, parallel_config, spans, topology_of
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.text import counted


def open_run(path: Path, config: Config | None = None) -> Checkpoint:
    """Open a step-* folder of a run. For a run directory, open its newest checkpoint that can be opened.

    Only the manifest and the headers of files are read, and checksums are not compared. `config` is not used, since each
    checkpoint's manifest has the configuration. Raises UserError if no checkpoint can be opened, or if the run trained only
    LoRA adapters or a ControlNet.
    """
    checkpoint, problems = first_good(path, _open_step, str(path))
    checkpoint.notes += [
        f"a newer checkpoint cannot be used, so {checkpoint.path.name} is read: {problem}" for problem in problems
    ]
    return checkpoint


def _open_step(folder: Path) -> Checkpoint:
    reader = CheckpointReader(folder)
    manifest, config = reader.manifest, reader.config()
    if config.trains_adapter_only:
        what, option, export = (
            ("a ControlNet", "--control-from", "controlnet") if config.control.enabled else ("adapters", "--lora", "peft")
        )
        raise UserError(
            f"{folder} contains only {what}, without the base model. Give the base model, {config.run.init_from}, instead "
            f"of this folder, and add {option} {shlex.quote(str(folder))}; or export {what} with --to {export} "
            "(docs/adapters.md)."
        )
    world_size = manifest.get("world_size")
    ranks = "? ranks" if world_size is None else counted(world_size, "rank")
    topology = f"{ranks}, ep {config.parallel.space_ep},{config.parallel.time_ep}"
    files, progress = checksummed_files(folder, manifest), progress_of(manifest)
    checkpoint = Checkpoint(folder, config, reader.spans(), progress, manifest["dataset"], files, topology)
    if set(checkpoint.shapes) != set(reader.shapes):
        name = min(set(checkpoint.shapes) ^ set(reader.shapes))
        problem = "it also lists" if name in reader.shapes else "it does not list"
        raise UserError(
            f"{folder / MANIFEST} must list exactly the parameters of the model that its entry 'config' describes, but "
            f"{problem} {name}. Replace the checkpoint by a backup copy, or use another one."
        )
    checkpoint.check()
    return checkpoint


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to a run directory `target` with one checkpoint, from which a run can resume.

    `options`: number of ranks, ZeRO stage and expert parallelism. The checkpoint has the source's step, or step 0 if the
    source lacks the Adam moments of its run. Raises UserError if the model does not allow the values in `options`.
    """
    config = parallel_config(source.config, options)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": target, "init_from": None})})
    progress, notes = progress_of_target(source)
    folder = f"checkpoints/step-{progress.step:08d}"
    topology = topology_of(config, options)
    zero_kinds = () if config.optim.kind == "sgd" else tuple(kind for kind in MOMENTS if kind not in source.kinds())
    files = [_rank_file(source, topology, rank, folder, zero_kinds) for rank in range(options.world)]
    manifest = base_manifest("raphael", source) | {
        **progress.as_manifest(),
        "world_size": options.world,
        "config": stored_tree(config),
        "tensors": {name: list(shape) for name, shape in source.shapes.items()},
    }
    manifest.pop("layout")
    small = {"config.yaml": to_yaml(config).encode(), "checkpoints/latest": Path(folder).name.encode()}
    return ConversionPlan(files, source.kinds(), f"{folder}/{MANIFEST}", manifest, small, notes)


def _rank_file(source: Source, topology: Topology, rank: int, folder: str, zero_kinds: tuple[str, ...]) -> OutFile:
    entries, starts = [], {}
    for span in spans(source.shapes, topology, rank):
        for kind in (*source.kinds(), *zero_kinds):
            key = f"{kind}/{span.name}"
            entries.append(Entry(key, (span.numel,), (Piece(ZEROS if kind in zero_kinds else kind, span),)))
            starts[key] = span.start
    return OutFile(f"{folder}/rank-{rank:05d}.safetensors", tuple(entries), {"starts": json.dumps(starts)})


def detect(path: Path) -> bool:
    """Return whether `path` is a run directory of this trainer, its checkpoints folder or a step-* folder."""
    return (path / "checkpoints").is_dir() or any(path.glob("step-*")) or (path / MANIFEST).is_file()


LAYOUT = Layout("raphael", "everything", detect, open_run, plan, RANKS)
