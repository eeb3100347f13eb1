"""Reads what DeepSpeed 0.19 writes: `mp_rank_00_model_states.pt` and `zero_pp_rank_R_mp_rank_00_optim_states.pt`.

ZeRO's files hold flat buffers without names. Names come from `param_shapes` (the order in the buffer) and are compared with
`param_slice_mappings` (offset and size by name) in every shard; which experts a shard holds follows from its rank and the
size in its group's name `ep_size_N`, never from the position of the group.
"""

import re
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.progress import Progress, progress_of
from raphael_dist.checkpoint.tensors import Key, Span
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.layouts import canonical
from raphael_dist.convert.layouts.deepspeed.classes import ALLOWED
from raphael_dist.convert.manifest import manifest_beside, vouched
from raphael_dist.convert.partition import Group, Topology, groups, zero3
from raphael_dist.convert.source import Checkpoint, parameter_shapes
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import Stored
from raphael_dist.storage.torchfile import load_tree

MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


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


def detect(path: Path) -> bool:
    """Return whether DeepSpeed saved here. A run directory into which it saved too is a run."""
    return tag_folder(path) is not None and not (path / "checkpoints").is_dir()


def pickles(path: Path) -> list[Path]:
    """Return the files of torch.save in the folder."""
    return sorted((tag_folder(path) or path).glob("*.pt"))


def open_deepspeed(path: Path, config: Config | None) -> Checkpoint:
    """Open a folder of DeepSpeed's `save_checkpoint`. `config` is needed where no manifest of ours lies beside the files.

    UserError when a file is missing, damaged, or a pickle of more than weights; when experts are missing or doubled.
    """
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"--from deepspeed {path}: neither {MODEL} nor a `latest` that names a folder with it")
    manifest = manifest_beside(folder, "deepspeed")
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    if config is None:
        raise UserError(f"--from deepspeed {path}: the files do not say the model; give --config PRESET_OR_YAML")
    model = load_tree(folder / (MODEL if (folder / MODEL).is_file() else MODEL_3), ALLOWED)
    shapes = parameter_shapes(config)
    files = _Files(folder, model, shapes)
    step = int(model["global_steps"])
    progress = Progress(step, step * config.train.global_batch, step - int(model.get("skipped_steps", 0)), {})
    checkpoint = Checkpoint(folder, config, files.spans, progress, topology=files.topology)
    if manifest is not None:
        checkpoint.progress = progress_of(manifest)._replace(step=step, updates=progress.updates)
        checkpoint.dataset, checkpoint.files = manifest["dataset"], vouched(folder, manifest)
        checkpoint.spans |= canonical.read_kinds(folder, manifest, shapes)
    checkpoint.check()
    return checkpoint


def _shards(folder: Path, world: int) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _OPTIM.fullmatch(path.name):
            other = by_rank.setdefault(int(match[1]), path)
            if other != path:
                raise UserError(f"{folder}: two files of rank {int(match[1])}: {other.name} and {path.name}")
    lacking = set(range(world)) - by_rank.keys()
    if lacking:
        raise UserError(f"{folder}: the ZeRO file of rank {min(lacking)} of {world} is missing")
    return [by_rank[rank] for rank in range(world)]


class _Files:
    """What lies where in DeepSpeed's files of one checkpoint. topology: which ranks wrote it, in words."""

    def __init__(self, folder: Path, model: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self._folder, self._model, self._shapes = folder, model, shapes
        self._world = int(model["dp_world_size"])
        self.spans: dict[Key, list[Stored]] = {}
        self._spreads: dict[str, int] = {}  # over how many ranks each parameter's experts are spread
        stage, ep = 0, ""
        if not any(_OPTIM.fullmatch(p.name) for p in folder.iterdir()):
            self._read_plain()
        else:
            shards = {file: load_tree(file, ALLOWED)["optimizer_state_dict"] for file in _shards(folder, self._world)}
            stage = 3 if (folder / MODEL_3).is_file() else int(next(iter(shards.values())).get("zero_stage", 1))
            for rank, (file, state) in enumerate(shards.items()):
                if stage == 3:
                    self._read_zero3(file, rank, state)
                else:
                    self._read_zero12(file, rank, state)
        if stage in (1, 2):
            ep = f", ep {self._spread_of('space')},{self._spread_of('time')}"
        self.topology = f"{self._world} ranks, ZeRO-{stage}{ep}"

    def _spread_of(self, kind: str) -> int:
        return next((spread for name, spread in self._spreads.items() if f".{kind}_moe." in name), 1)

    def _read_zero12(self, file: Path, rank: int, state: dict[str, Any]) -> None:
        optimizer = state["base_optimizer_state"]
        if not isinstance(optimizer, dict):
            raise UserError(f"{file}: an elastic ZeRO checkpoint, which DeepSpeed 0.19 cannot load either; save without it")
        masters, described = state["single_partition_of_fp32_groups"], self._model["param_shapes"]
        for i, (names, settings, master) in enumerate(zip(described, optimizer["param_groups"], masters, strict=True)):
            spread = _spread(settings)
            self._spreads |= dict.fromkeys(names, spread)
            group = self._rebuild(file, rank, spread, names, state, i)
            moments = optimizer["state"].get(settings["params"][0], {})
            # More elements are the padding at the end of the buffer.
            self._add(file, i, master, moments, group.spans, group.per_rank)

    def _read_zero3(self, file: Path, rank: int, state: dict[str, Any]) -> None:
        optimizer = state["optimizer_state_dict"]
        for i, (names, master) in enumerate(zip(self._model["param_shapes"], state["fp32_flat_groups"], strict=True)):
            self._check_shapes(file, names, self._shapes)
            spans, size = zero3(names, self._world, rank)
            self._add(file, i, master, optimizer["state"].get(i, {}), spans, size)

    def _read_plain(self) -> None:
        """ZeRO-0: the weights by name; moments in the order of the parameters."""
        weights, optimizer = self._model["module"], self._model["optimizer"]
        if optimizer is None:
            raise UserError(f"{self._folder}: neither ZeRO files nor an optimizer in {MODEL}")
        indices = [i for group in optimizer["param_groups"] for i in group["params"]]
        if len(indices) != len(self._shapes):
            given = f"the optimizer steps {len(indices)} parameters, the model has {len(self._shapes)}"
            raise UserError(f"{self._folder}: {given}")
        self.spans = {("master", name): [stored] for name, stored in weights.items()}
        for name, i in zip(self._shapes, indices, strict=True):
            moments = optimizer["state"].get(i, {})
            self.spans |= {(kind, name): [moments[kind]] for kind in MOMENTS if kind in moments}

    def _add(self, file: Path, i: int, master: Stored, moments: Any, spans: dict[Span, int], size: int) -> None:
        """Add the flat buffers of group `i`, in which `spans` lie at their offsets, of at least `size` elements."""
        for kind, flat in {"master": master, **{kind: moments[kind] for kind in MOMENTS if kind in moments}}.items():
            if flat.numel < size:
                raise UserError(f"{file}: {kind} of group {i} has {flat.numel} elements, its parameters take {size}")
            for span, offset in spans.items():
                self.spans.setdefault((kind, span.name), []).append(flat.part(offset, span.numel, span.start))

    def _rebuild(self, file: Path, rank: int, spread: int, names: Any, state: dict[str, Any], i: int) -> Group:
        """Work out where the group's parameters lie, and compare with what the shard says about it."""
        unknown = next((name for name in names if name not in self._shapes), None)
        if unknown:
            raise UserError(f"{file}: {unknown} is no parameter of this configuration's model; another --config?")
        paddings = state.get("param_alignment_paddings")
        whole = {name: self._shapes[name] for name in names}
        # 16 bytes, in elements of float32 or of bfloat16.
        for alignment in (4, 8) if paddings and any(paddings[i]) else (1,):
            topology = Topology(self._world, spread, spread, 1, alignment)
            group = next(g for g in groups(whole, topology, rank) if set(g.shapes) == set(names))
            if paddings is None or list(paddings[i]) == group.paddings:
                break
        else:
            raise UserError(f"{file}: the paddings of group {i} do not belong to its parameters")
        self._check_shapes(file, names, group.shapes)
        said = {name: (a.start, a.numel) for name, a in state["param_slice_mappings"][i].items()}
        ours = {span.name: (offset, span.numel) for span, offset in group.spans.items()}
        if said != ours:
            wrong = min(name for name in said.keys() | ours.keys() if said.get(name) != ours.get(name))
            raise UserError(f"{file}: {wrong} is said to lie at {said.get(wrong)}, its place is {ours.get(wrong)}")
        return group

    def _check_shapes(self, file: Path, names: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in names.items():
            if tuple(shape) != shapes.get(name):
                raise UserError(f"{file}: {name} has shape {list(shape)} per rank, the model gives {shapes.get(name)}")


def _spread(settings: dict[str, Any]) -> int:
    match = re.fullmatch(r"ep_size_(\d+)", str(settings.get("name", ""))) if settings.get("moe") else None
    return int(match[1]) if match else 1
