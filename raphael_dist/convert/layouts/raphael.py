"""The layout that the trainer writes: a run directory with `checkpoints/step-XXXXXXXX/`, flat spans per rank.

What it means stands in `checkpoint.reader`; here is how any topology's files are planned.
"""

import json
from pathlib import Path

from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, first_good
from raphael_dist.config import Config, to_yaml
from raphael_dist.config_adapters import beside
from raphael_dist.convert.layouts import RANKS, Layout
from raphael_dist.convert.manifest import base_manifest, vouched
from raphael_dist.convert.partition import Topology, parallel_config, spans, topology_of
from raphael_dist.convert.plan import ZEROS, ConversionPlan, Entry, Options, OutFile, Piece, Source, progress_of_target
from raphael_dist.convert.source import Checkpoint
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError


def open_run(path: Path, config: Config | None = None) -> Checkpoint:
    """Open a run directory (its newest checkpoint that is whole by its headers) or a step folder."""
    checkpoint, problems = first_good(path, _open_step, str(path))
    checkpoint.notes += [f"skipped, {checkpoint.path.name} is taken instead: {problem}" for problem in problems]
    return checkpoint


def _open_step(folder: Path) -> Checkpoint:
    reader = CheckpointReader(folder)
    manifest, config = reader.manifest, reader.config()
    if beside(config):
        what, option = ("the control", "--control-from") if config.control.enabled else ("the adapters", "--lora")
        raise UserError(
            f"{folder} holds {what} of {config.run.init_from} alone; give that model, and this as {option} "
            "(docs/adapters.md)"
        )
    files, topology = vouched(folder, manifest), f"ep {config.parallel.space_ep},{config.parallel.time_ep}"
    checkpoint = Checkpoint(folder, config, reader.spans(), progress_of(manifest), manifest["dataset"], files)
    checkpoint.topology = f"{manifest.get('world_size', '?')} ranks, {topology}"
    if set(checkpoint.shapes) != set(reader.shapes):
        wrong = sorted(set(checkpoint.shapes) ^ set(reader.shapes))
        raise UserError(f"{folder}: {wrong[0]} does not fit the model of its own configuration")
    checkpoint.check()
    return checkpoint


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Plan a run directory with one checkpoint as of `options.world` ranks; without moments it begins at step 0."""
    config = parallel_config(source.config, options)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": target, "init_from": None})})
    progress, notes = progress_of_target(source)
    folder = f"checkpoints/step-{progress.step:08d}"
    topology = topology_of(config, options)
    made = () if config.optim.kind == "sgd" else tuple(kind for kind in MOMENTS if kind not in source.kinds())
    files = [_rank_file(source, topology, rank, folder, made) for rank in range(options.world)]
    manifest = base_manifest("raphael", source) | {
        "format": FORMAT,
        **progress.as_manifest(),
        "world_size": options.world,
        "config": config.model_dump(mode="json"),
        "tensors": {name: list(shape) for name, shape in source.shapes.items()},
    }
    manifest.pop("layout")
    small = {"config.yaml": to_yaml(config).encode(), "checkpoints/latest": Path(folder).name.encode()}
    return ConversionPlan(files, source.kinds(), f"{folder}/{MANIFEST}", manifest, small, notes)


def _rank_file(source: Source, topology: Topology, rank: int, folder: str, made: tuple[str, ...]) -> OutFile:
    entries, starts = [], {}
    for span in spans(source.shapes, topology, rank):
        for kind in (*source.kinds(), *made):
            key = f"{kind}/{span.name}"
            entries.append(Entry(key, (span.numel,), (Piece(ZEROS if kind in made else kind, span),)))
            starts[key] = span.start
    return OutFile(f"{folder}/rank-{rank:05d}.safetensors", tuple(entries), {"starts": json.dumps(starts)})


def detect(path: Path) -> bool:
    """Return whether this is a run directory, its folder of checkpoints or one of them."""
    return (path / "checkpoints").is_dir() or any(path.glob("step-*")) or (path / MANIFEST).is_file()


LAYOUT = Layout("raphael", "everything", detect, open_run, plan, RANKS)
