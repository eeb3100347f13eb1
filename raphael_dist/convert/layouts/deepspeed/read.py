"""Reads what DeepSpeed 0.19 writes: `mp_rank_00_model_states.pt` and `zero_pp_rank_R_mp_rank_00_optim_states.pt`.

ZeRO's files hold flat buffers without names. Names come from `param_shapes` (the order in the buffer) and are compared with
`param_slice_mappings` (name -> stretch) in every shard; which experts a shard holds follows from its rank and the size in
its group's name `ep_size_N`, never from the position of the group.
"""

import re
from math import prod
from pathlib import Path
from typing import Any

from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.layouts import canonical
from raphael_dist.convert.manifest import read_manifest, vouched
from raphael_dist.convert.partition import Group, Topology, groups, zero3
from raphael_dist.convert.source import Checkpoint, Range, parameter_shapes
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import Stored
from raphael_dist.storage.torchfile import load_tree

MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
Ranges = dict[tuple[str, str], list[Range]]


def tag_folder(path: Path) -> Path | None:
    """Return the folder with the files: `path` itself, or the one that its file `latest` names."""
    if (path / MODEL).is_file() or (path / MODEL_3).is_file():
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(errors="replace").strip()
    inside = path / tag if tag and Path(tag).name == tag else None
    return inside if inside and ((inside / MODEL).is_file() or (inside / MODEL_3).is_file()) else None


def open_deepspeed(path: Path, config: Config | None) -> Checkpoint:
    """Open a folder of DeepSpeed's `save_checkpoint`. `config` is needed where no manifest of ours lies beside the files.

    UserError when a file is missing, damaged, or a pickle of more than weights; when experts are missing or doubled.
    """
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"--from deepspeed {path}: neither {MODEL} nor a `latest` that names a folder with it")
    manifest = read_manifest(folder / "manifest.json", "deepspeed") if (folder / "manifest.json").is_file() else None
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    if config is None:
        raise UserError(f"--from deepspeed {path}: the files do not say the model; give --config PRESET_OR_YAML")
    model = load_tree(folder / (MODEL if (folder / MODEL).is_file() else MODEL_3))
    shapes = parameter_shapes(config)
    ranges, stage, topology = _ranges(folder, model, shapes, config)
    step = int(model["global_steps"])
    samples, dataset = step * config.train.global_batch, ""
    guard: dict[str, Any] = {}
    if manifest is not None:
        samples, dataset, guard = int(manifest["samples_seen"]), manifest["dataset"], manifest.get("guard") or {}
        ranges |= canonical.read_kinds(folder, manifest, shapes)
    found = Checkpoint(
        "deepspeed",
        folder,
        config,
        step,
        samples,
        dataset,
        ranges,
        vouched(folder, manifest) if manifest else {},
        f"{model['dp_world_size']} ranks, ZeRO-{stage}{topology}",
        step - int(model.get("skipped_steps", 0)),
        guard,
    )
    found.check()
    return found


def _ranges(
    folder: Path, model: dict[str, Any], shapes: dict[str, tuple[int, ...]], config: Config
) -> tuple[Ranges, int, str]:
    world = int(model["dp_world_size"])
    if not any(_OPTIM.fullmatch(p.name) for p in folder.iterdir()):
        return _plain(folder, model, shapes), 0, ""
    shards = _shards(folder, world)
    states = [load_tree(file)["optimizer_state_dict"] for file in shards]
    if (folder / MODEL_3).is_file():
        return _zero3(folder, model, states, shapes), 3, ""
    ranges: Ranges = {}
    spreads: dict[str, int] = {}
    for rank, (file, state) in enumerate(zip(shards, states, strict=True)):
        _read_shard(file, rank, world, model, state, shapes, ranges, spreads)
    stage = int(states[0].get("zero_stage", 1))
    ep = [next((s for name, s in spreads.items() if f".{kind}_moe." in name), 1) for kind in ("space", "time")]
    return ranges, stage, f", ep {ep[0]},{ep[1]}"


def _shards(folder: Path, world: int) -> list[Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _OPTIM.fullmatch(path.name):
            if int(match[1]) in found:
                raise UserError(f"{folder}: two files of rank {int(match[1])}: {found[int(match[1])].name} and {path.name}")
            found[int(match[1])] = path
    lacking = set(range(world)) - found.keys()
    if lacking:
        raise UserError(f"{folder}: the ZeRO file of rank {min(lacking)} of {world} is missing")
    return [found[rank] for rank in range(world)]


def _read_shard(
    file: Path,
    rank: int,
    world: int,
    model: dict[str, Any],
    state: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    ranges: Ranges,
    spreads: dict[str, int],
) -> None:
    """Add what the shard of one rank under ZeRO-1 or 2 holds."""
    optimizer = state["base_optimizer_state"]
    if not isinstance(optimizer, dict):
        raise UserError(f"{file}: an elastic ZeRO checkpoint, which DeepSpeed 0.19 cannot load either; save without it")
    described = zip(model["param_shapes"], optimizer["param_groups"], state["single_partition_of_fp32_groups"], strict=True)
    for i, (names, settings, master) in enumerate(described):
        spread = _spread(settings)
        spreads |= dict.fromkeys(names, spread)
        group = _rebuild(file, rank, world, spread, names, state, i, shapes)
        moments = optimizer["state"].get(settings["params"][0], {})
        tensors = {"master": master, **{kind: moments[kind] for kind in MOMENTS if kind in moments}}
        for kind, flat in tensors.items():
            if flat.numel < group.lean:
                raise UserError(f"{file}: {kind} of group {i} has {flat.numel} elements, its parameters take {group.lean}")
            _add(ranges, kind, group.slots, flat)


def _spread(settings: dict[str, Any]) -> int:
    found = re.fullmatch(r"ep_size_(\d+)", str(settings.get("name", ""))) if settings.get("moe") else None
    return int(found[1]) if found else 1


def _rebuild(
    file: Path, rank: int, world: int, spread: int, names: Any, state: dict[str, Any], i: int, shapes: dict[str, Any]
) -> Group:
    """Work out where the group's parameters lie, and compare with what the shard says about it."""
    unknown = next((name for name in names if name not in shapes), None)
    if unknown:
        raise UserError(f"{file}: {unknown} is no parameter of this configuration's model; another --config?")
    paddings = state.get("param_alignment_paddings")
    aligned = max((p for p in paddings[i]), default=0) > 0 if paddings else False
    whole = {name: shapes[name] for name in names}
    for candidate in _alignments(aligned):
        topology = Topology(world, spread, spread, 1, candidate)
        group = next(g for g in groups(whole, topology, rank) if set(g.shapes) == set(names))
        if paddings is None or list(paddings[i]) == group.paddings:
            break
    else:
        raise UserError(f"{file}: the paddings of group {i} do not belong to its parameters")
    for name, shape in names.items():
        if tuple(shape) != group.shapes[name]:
            raise UserError(f"{file}: {name} has shape {list(shape)} per rank, the model gives {list(group.shapes[name])}")
    said = {name: (a.start, a.numel) for name, a in state["param_slice_mappings"][i].items()}
    found = {slot.name: (slot.offset, slot.numel) for slot in group.slots}
    if said != found:
        wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
        raise UserError(f"{file}: {wrong[0]} is said to lie at {said.get(wrong[0])}, its place is {found.get(wrong[0])}")
    return group


def _alignments(aligned: bool) -> tuple[int, ...]:
    # 16 bytes, in elements of float32 or of bfloat16.
    return (4, 8) if aligned else (1,)


def _add(ranges: Ranges, kind: str, slots: Any, flat: Stored) -> None:
    for slot in slots:
        begin = flat.offset + slot.offset * flat.dtype.itemsize
        stored = Stored(flat.path, begin, flat.dtype, (slot.numel,))
        ranges.setdefault((kind, slot.name), []).append(Range(slot.start, stored))


def _zero3(folder: Path, model: dict[str, Any], states: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]) -> Ranges:
    ranges: Ranges = {}
    for rank, state in enumerate(states):
        optimizer = state["optimizer_state_dict"]
        for i, (names, master) in enumerate(zip(model["param_shapes"], state["fp32_flat_groups"], strict=True)):
            for name, shape in names.items():
                if tuple(shape) != shapes.get(name):
                    raise UserError(f"{folder}: {name} has shape {list(shape)}, the model gives {shapes.get(name)}")
            slots, total = zero3(names, len(states), rank)
            moments = optimizer["state"].get(i, {})
            tensors = {"master": master, **{kind: moments[kind] for kind in MOMENTS if kind in moments}}
            for kind, flat in tensors.items():
                if flat.numel != total:
                    raise UserError(
                        f"{folder}: {kind} of rank {rank} has {flat.numel} elements, its parameters take {total}"
                    )
                _add(ranges, kind, slots, flat)
    return ranges


def _plain(folder: Path, model: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Ranges:
    """ZeRO-0: the weights by name; moments in the order of the parameters."""
    weights, optimizer = model["module"], model["optimizer"]
    if optimizer is None:
        raise UserError(f"{folder}: neither ZeRO files nor an optimizer in {MODEL}")
    order = list(shapes)
    indices = [i for group in optimizer["param_groups"] for i in group["params"]]
    if len(indices) != len(order):
        raise UserError(f"{folder}: the optimizer steps {len(indices)} parameters, the model has {len(order)}")
    ranges: Ranges = {("master", name): [Range(0, stored)] for name, stored in weights.items()}
    for name, i in zip(order, indices, strict=True):
        for kind in MOMENTS:
            if kind in optimizer["state"].get(i, {}):
                ranges[kind, name] = [Range(0, optimizer["state"][i][kind])]
    for (_, name), (found, *_) in ranges.items():
        if found.numel != prod(shapes.get(name, ())):
            raise UserError(f"{folder}: {name} has {found.numel} elements, the model gives {shapes.get(name)}")
    return ranges
