"""The layout that the trainer writes: a run directory with `checkpoints/step-XXXXXXXX/`, flat ranges per rank.

What it means stands in `checkpoint.reader`; here are its ranges, and how any topology's files are planned.
"""

import json
from pathlib import Path

import torch

from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.reader import FORMAT, MANIFEST, CheckpointReader, newest
from raphael_dist.config import Config, config_from_tree, to_yaml
from raphael_dist.convert.manifest import base_manifest
from raphael_dist.convert.partition import Topology, slots
from raphael_dist.convert.plan import ZEROS, Entry, Options, OutFile, Plan, Source, Take, resumes
from raphael_dist.convert.source import Checkpoint, Range
from raphael_dist.engine import ds_config
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import place
from raphael_dist.storage.tensorfile import read_header


def open_run(path: Path) -> Checkpoint:
    """Open a run directory (its newest checkpoint that is whole by its headers) or a step folder."""
    if (path / MANIFEST).is_file():
        return _open_step(path)
    problems = []
    for folder in newest(path / "checkpoints") or newest(path):
        try:
            found = _open_step(folder)
        except UserError as error:
            problems.append(str(error))
        else:
            found.notes += [f"skipped, {folder.name} is taken instead: {problem}" for problem in problems]
            return found
    damaged = f"; damaged: {'; '.join(problems)}" if problems else ""
    raise UserError(f"{path}: no checkpoint of a run there{damaged}; give a run directory or one of its step-* folders")


def _open_step(folder: Path) -> Checkpoint:
    reader = CheckpointReader(folder)
    ranges: dict[tuple[str, str], list[Range]] = {}
    for file in reader.manifest["files"]:
        if not file.endswith(".safetensors"):
            continue
        tensors, metadata = read_header(folder / file)
        try:
            starts = json.loads(metadata["starts"])
            for key, stored in tensors.items():
                kind, _, name = key.partition("/")
                ranges.setdefault((kind, name), []).append(Range(int(starts[key]), stored))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{folder / file} does not say where its ranges start: {error}") from None
    manifest, progress = reader.manifest, progress_of(reader.manifest)
    config = reader.config()
    found = Checkpoint(
        "raphael",
        folder,
        config,
        reader.step,
        int(manifest["samples_seen"]),
        manifest["dataset"],
        ranges,
        {folder / name: entry for name, entry in manifest["files"].items()},
        f"{manifest.get('world_size', '?')} ranks, ep {config.parallel.space_ep},{config.parallel.time_ep}",
        progress.updates,
        progress.guard,
    )
    if set(found.shapes) != set(reader.shapes):
        wrong = sorted(set(found.shapes) ^ set(reader.shapes))
        raise UserError(f"{folder}: {wrong[0]} does not fit the model of its own configuration")
    found.check()
    return found


def parallel_config(config: Config, options: Options) -> Config:
    """Return the configuration with the target's expert parallelism. UserError when model, ranks or stage forbid it."""
    tree = config.model_dump(mode="json")
    tree["parallel"] |= {"space_ep": options.space_ep, "time_ep": options.time_ep}
    made = config_from_tree(tree)
    stage = {"zero_optimization": {"stage": options.stage}}
    ds_config.check_expert_parallel(made, stage, options.world)
    return made


def alignment(config: Config, stage: int) -> int:
    """Return how many elements ZeRO-1 and 2 round a parameter up to in flat buffers, as `ds_config.merge` sets it."""
    return 16 // getattr(torch, config.train.dtype).itemsize if stage in (1, 2) else 1


def topology_of(config: Config, options: Options, alignment: int) -> Topology:
    """Return where the options put everything; `config` has their expert parallelism already."""
    kept: frozenset[tuple[str, int]] = frozenset()
    if max(options.space_ep, options.time_ep) > 1:
        costs = place(config, BatchPlan.of(config, options.world))
        kept = frozenset((cost.kind, cost.level) for cost in costs if not cost.move)
    levels = len(config.model.channels)
    return Topology(options.world, options.space_ep, options.time_ep, options.stage, alignment, kept, levels)


def plan(source: Source, options: Options, target: Path) -> Plan:
    """Plan a run directory with one checkpoint as of `options.world` ranks; without moments it begins at step 0."""
    config = parallel_config(source.config, options)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": target, "init_from": None})})
    goes_on = resumes(source)
    step = source.step if goes_on else 0
    folder = f"checkpoints/step-{step:08d}"
    topology = topology_of(config, options, alignment(config, options.stage))
    made = () if config.optim.kind == "sgd" else tuple(kind for kind in MOMENTS if kind not in source.kinds())
    files = [_rank_file(source, topology, rank, folder, made) for rank in range(options.world)]
    manifest = base_manifest("raphael", source) | {
        "format": FORMAT,
        "step": step,
        "samples_seen": source.samples_seen if goes_on else 0,
        "updates": source.updates if goes_on else 0,
        "guard": source.guard if goes_on else {},
        "world_size": options.world,
        "config": config.model_dump(mode="json"),
        "tensors": {name: list(shape) for name, shape in source.shapes.items()},
    }
    manifest.pop("layout")
    notes = [] if goes_on else ["exp_avg, exp_avg_sq: not in the source; zero, at step 0, as in a new run"]
    small = {"config.yaml": to_yaml(config).encode(), "checkpoints/latest": Path(folder).name.encode()}
    return Plan("raphael", files, source.kinds(), f"{folder}/{MANIFEST}", manifest, small, notes)


def _rank_file(source: Source, topology: Topology, rank: int, folder: str, made: tuple[str, ...]) -> OutFile:
    entries, starts = [], {}
    for slot in slots(source.shapes, topology, rank):
        for kind in (*source.kinds(), *made):
            key = f"{kind}/{slot.name}"
            take = Take(ZEROS if kind in made else kind, slot.name, slot.start, slot.numel)
            entries.append(Entry(key, (slot.numel,), (take,)))
            starts[key] = slot.start
    return OutFile(f"{folder}/rank-{rank:05d}.safetensors", tuple(entries), {"starts": json.dumps(starts)})
