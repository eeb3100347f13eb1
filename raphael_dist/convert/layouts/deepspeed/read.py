"""Reads what DeepSpeed 0.19 writes: `mp_rank_00_model_states.pt` and `zero_pp_rank_R_mp_rank_00_optim_states.pt`.

ZeRO's files hold flat buffers without names. `param_shapes` in the model's file lists the parameters in the order of the
buffer. The offsets computed from this list must agree with `param_slice_mappings` (offset and size by name) in each rank's
file. Which experts a rank has is computed from the rank's number and from N, the number of ranks over which experts are
sharded. The name `ep_size_N` of a parameter group states N.

Other programs wrote the files, so `_item` checks that each entry that is read exists and has the expected type.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from raphael_dist.checkpoint.progress import Progress, progress_of
from raphael_dist.checkpoint.tensors import Key, Span
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import checksummed_files, read_optional_manifest
from raphael_dist.convert.layouts import canonical
from raphael_dist.convert.layouts.deepspeed.classes import ALLOWED
from raphael_dist.convert.source_checkpoint import Checkpoint, parameter_shapes
from raphael_dist.convert.zero_partition import Group, Topology, groups, zero3
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import load_tree
from raphael_dist.text import counted

MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_LONGEST_TAG = 255
_OTHER_CONFIG = "Set --config to the configuration of the run that wrote this file."
_KINDS: dict[type, str] = {dict: "a dictionary", list: "a list", int: "an integer", StoredTensor: "a tensor"}
T = TypeVar("T")
Tree = dict[str, Any]  # of unpickled dicts, lists and plain values, with a StoredTensor for each tensor
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def tag_folder(path: Path) -> Path | None:
    """Return the folder with a checkpoint's DeepSpeed files: `path`, or the subfolder that the file `latest` in it names.

    Returns None if `path` has neither DeepSpeed files nor a file `latest`. Raises UserError if `latest` names a folder
    without DeepSpeed files.
    """
    if _has_model(path):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(errors="replace").strip()[:_LONGEST_TAG]
    if Path(tag).name == tag and _has_model(path / tag):
        return path / tag
    tags = sorted(folder.name for folder in path.iterdir() if _has_model(folder))
    hint = (
        f"Write one of {', '.join(tags)} into this file."
        if tags
        else "No other folder next to it contains a checkpoint of DeepSpeed. Check the path."
    )
    raise UserError(
        f"{latest} must contain the name of a folder with {MODEL}, but it contains {tag!r}, and that folder or file is "
        f"missing. {hint}"
    )


def _has_model(folder: Path) -> bool:
    return (folder / MODEL).is_file() or (folder / MODEL_3).is_file()


def detect(path: Path) -> bool:
    """Return whether `path` contains a checkpoint that DeepSpeed saved. Run directories of this trainer do not count."""
    is_run = (path / "checkpoints").is_dir() or any(path.glob("step-*"))  # it has a file `latest` too
    return not is_run and (_has_model(path) or (path / "latest").is_file())


def pickles(path: Path) -> list[Path]:
    """Return the files that opening the DeepSpeed checkpoint `path` would unpickle: its .pt files, written by torch.save."""
    return sorted((tag_folder(path) or path).glob("*.pt"))


def open_deepspeed(path: Path, config: Config | None) -> Checkpoint:
    """Open a checkpoint that DeepSpeed's `save_checkpoint` wrote.

    Args:
        path: the folder with the files, or its parent folder with the file `latest`.
        config: configuration of the model; required if the folder has no manifest of this project.

    Raises:
        UserError: a file is missing, is damaged, or contains objects other than weights; experts are missing or duplicate.
    """
    folder = tag_folder(path)
    if folder is None:
        raise UserError(
            f"--from deepspeed {path} must contain {MODEL}, or a file `latest` that names a folder with it, but it has "
            "neither. Check the path."
        )
    manifest = read_optional_manifest(folder, "deepspeed")
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    if config is None:
        raise UserError(
            f"--from deepspeed {path}: --config is required, since these files do not state the model's settings. Add "
            "--config PRESET_OR_YAML with the configuration that the model was trained with."
        )
    model_file = folder / (MODEL if (folder / MODEL).is_file() else MODEL_3)
    model = load_tree(model_file, ALLOWED)
    shapes = parameter_shapes(config)
    files = _Files(model_file, model, shapes)
    step = _item(model_file, model, "global_steps", int)
    progress = Progress(step, step * config.train.global_batch_size, step - int(model.get("skipped_steps", 0)), {})
    checkpoint = Checkpoint(folder, config, files.spans, progress, topology=files.topology)
    if manifest is not None:
        checkpoint.progress = progress_of(manifest)._replace(step=step, updates=progress.updates)
        checkpoint.dataset, checkpoint.files = manifest["dataset"], checksummed_files(folder, manifest)
        checkpoint.spans |= canonical.read_kinds(folder, manifest, shapes)
    checkpoint.check()
    return checkpoint


def _shards(folder: Path, world: int) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _OPTIM.fullmatch(path.name):
            other = by_rank.setdefault(int(match[1]), path)
            if other != path:
                raise UserError(
                    f"{folder} must have exactly one ZeRO file for each rank, but {other.name} and {path.name} are both for "
                    f"rank {int(match[1])}. One of the two is from another save. Compare their dates with the dates of the "
                    "other files, and move the file from the other save out of the folder."
                )
    missing = set(range(world)) - by_rank.keys()
    if missing:
        raise UserError(
            f"{folder} must have a ZeRO file for each of its {world} ranks, but the file of rank {min(missing)} is "
            "missing. Copy it into the folder from the machine that wrote it."
        )
    return [by_rank[rank] for rank in range(world)]


def _item(file: Path, tree: Any, key: str | int, kind: type[T]) -> T:
    """Return the item `key` of `tree`, an unpickled dict or list.

    Raises UserError, which names `file`, if the item is missing or is not of the type `kind`.
    """
    try:
        value = tree[key]
    except (LookupError, TypeError):
        value = None
    if not isinstance(value, kind):
        raise UserError(
            f"{file} must contain the entry {key!r} ({_KINDS[kind]}), as files of DeepSpeed 0.19 do, but it does not. Save "
            "the checkpoint again with DeepSpeed 0.19."
        )
    return value


class _Files:
    """Finds where the values of all parameters lie in DeepSpeed's files of one checkpoint.

    Attributes:
        spans: for each (kind, parameter), where its values are in the files. Kinds are "master" (fp32 weights), "exp_avg"
            and "exp_avg_sq" (Adam moments).
        topology: text for the user that states the number of ranks, the ZeRO stage and the expert parallelism of the files.
    """

    def __init__(self, model_file: Path, model: Tree, shapes: dict[str, tuple[int, ...]]) -> None:
        self._file, self._model, self._shapes = model_file, model, shapes
        self._world = _item(model_file, model, "dp_world_size", int)
        self.spans: dict[Key, list[StoredTensor]] = {}
        self._ep_sizes: dict[str, int] = {}  # ranks over which the experts of each parameter are sharded
        stage, ep, folder = 0, "", model_file.parent
        if not any(_OPTIM.fullmatch(p.name) for p in folder.iterdir()):
            self._read_zero0()
        else:
            shards = {
                file: _item(file, load_tree(file, ALLOWED), "optimizer_state_dict", dict)
                for file in _shards(folder, self._world)
            }
            stage = 3 if (folder / MODEL_3).is_file() else int(next(iter(shards.values())).get("zero_stage", 1))
            for rank, (file, state) in enumerate(shards.items()):
                if stage == 3:
                    self._read_zero3(file, rank, state)
                else:
                    self._read_zero12(file, rank, state)
        if stage in (1, 2):
            ep = f", ep {self._ep_size('space')},{self._ep_size('time')}"
        self.topology = f"{counted(self._world, 'rank')}, ZeRO-{stage}{ep}"

    def _ep_size(self, kind: str) -> int:
        return next((ep_size for name, ep_size in self._ep_sizes.items() if f".{kind}_moe." in name), 1)

    def _read_zero12(self, file: Path, rank: int, state: Tree) -> None:
        if isinstance(state.get("base_optimizer_state"), list):
            raise UserError(
                f"{file} must be saved without elastic_checkpoint, but it was saved with elastic_checkpoint=true, which "
                "DeepSpeed 0.19 cannot load either. Save it again without this setting."
            )
        optimizer = _item(file, state, "base_optimizer_state", dict)
        states, groups_settings = _item(file, optimizer, "state", dict), _item(file, optimizer, "param_groups", list)
        masters = _item(file, state, "single_partition_of_fp32_groups", list)
        for i in range(len(_item(self._file, self._model, "param_shapes", list))):
            shapes = _item(self._file, self._model["param_shapes"], i, dict)
            settings = _item(file, groups_settings, i, dict)
            ep_size = _ep_size_of(settings)
            self._ep_sizes |= dict.fromkeys(shapes, ep_size)
            group = self._rebuild(file, rank, ep_size, shapes, state, i)
            moments = states.get(_item(file, _item(file, settings, "params", list), 0, int), {})
            # A buffer may be longer: it ends with padding.
            self._add(file, i, _item(file, masters, i, StoredTensor), moments, group.spans, group.per_rank)

    def _read_zero3(self, file: Path, rank: int, state: Tree) -> None:
        states = _item(file, _item(file, state, "optimizer_state_dict", dict), "state", dict)
        masters = _item(file, state, "fp32_flat_groups", list)
        for i in range(len(_item(self._file, self._model, "param_shapes", list))):
            shapes = _item(self._file, self._model["param_shapes"], i, dict)
            self._check_shapes(file, shapes, self._shapes)
            spans, size = zero3(shapes, self._world, rank)
            self._add(file, i, _item(file, masters, i, StoredTensor), states.get(i, {}), spans, size)

    def _read_zero0(self) -> None:
        """Record where values lie in a ZeRO-0 file: weights are stored by name, moments in the order of the parameters."""
        file = self._file
        weights, optimizer = _item(file, self._model, "module", dict), _item(file, self._model, "optimizer", dict)
        param_groups, states = _item(file, optimizer, "param_groups", list), _item(file, optimizer, "state", dict)
        indices = [i for group in param_groups for i in _item(file, group, "params", list)]
        if len(indices) != len(self._shapes):
            raise UserError(
                f"{file}: the optimizer must have a state for each parameter of the model ({len(self._shapes)}), but it "
                f"has {len(indices)}. {_OTHER_CONFIG}"
            )
        self.spans = {("master", name): [_item(file, weights, name, StoredTensor)] for name in weights}
        for name, i in zip(self._shapes, indices, strict=True):
            moments = states.get(i, {})
            self.spans |= {(k, name): [_item(file, moments, k, StoredTensor)] for k in MOMENTS if k in moments}

    def _add(self, file: Path, i: int, master: StoredTensor, moments: Tree, spans: dict[Span, int], size: int) -> None:
        """Record where the values of parameters lie in one rank's flat buffers of the optimizer's parameter group `i`.

        Args:
            file: the rank's file, for messages.
            i: number of the group, for messages.
            master: location of the buffer of fp32 weights in the file.
            moments: the optimizer's state, with the locations of the buffers of Adam moments.
            spans: for each range of a parameter's elements in these buffers, the offset of its first element. The offset is
                the same in all buffers.
            size: smallest number of elements that a buffer must have.
        """
        flat_moments = {kind: _item(file, moments, kind, StoredTensor) for kind in MOMENTS if kind in moments}
        for kind, flat in {"master": master, **flat_moments}.items():
            if flat.numel < size:
                raise UserError(
                    f"{file}: the flat buffer of {'weights' if kind == 'master' else kind} of parameter group {i} must have "
                    f"at least {size} elements, but it has {flat.numel}. {_OTHER_CONFIG}"
                )
            for span, offset in spans.items():
                self.spans.setdefault((kind, span.name), []).append(flat.part(offset, span.numel, span.start))

    def _rebuild(
        self, file: Path, rank: int, ep_size: int, shapes: Mapping[str, Sequence[int]], state: Tree, i: int
    ) -> Group:
        """Compute where the parameters of the optimizer's group `i` lie in a rank's flat buffer.

        Args:
            file: the rank's file, for messages.
            rank: number of the rank.
            ep_size: number of ranks over which the experts are sharded.
            shapes: shapes of the group's parameters on one rank, by name, as the model's file states them.
            state: the optimizer's state in the rank's file.
            i: number of the group.

        Returns:
            The group, with the offset of each parameter in the flat buffer.

        Raises:
            UserError: the rank's file states other parameters, shapes, offsets or sizes than the computed ones.
        """
        unknown = next((name for name in shapes if name not in self._shapes), None)
        if unknown:
            raise UserError(
                f"{file} contains {unknown}, which is not a parameter of the model that --config describes. {_OTHER_CONFIG}"
            )
        paddings = state.get("param_alignment_paddings")
        whole = {name: self._shapes[name] for name in shapes}
        # 16 bytes, in elements of float32 or of bfloat16.
        for alignment in (4, 8) if paddings and any(paddings[i]) else (1,):
            topology = Topology(self._world, ep_size, ep_size, 1, alignment)
            group = next(g for g in groups(whole, topology, rank) if set(g.shapes) == set(shapes))
            if paddings is None or list(paddings[i]) == group.paddings:
                break
        else:
            assert paddings is not None  # otherwise the loop ends with the first alignment
            raise UserError(
                f"{file}: param_alignment_paddings of parameter group {i} must be {group.paddings}, as the shapes of its "
                f"parameters require, but the file states {list(paddings[i])}. {_OTHER_CONFIG}"
            )
        self._check_shapes(file, shapes, group.shapes)
        mappings = _item(file, _item(file, state, "param_slice_mappings", list), i, dict)
        stated = {name: (a.start, a.numel) for name, a in mappings.items()}
        computed = {span.name: (offset, span.numel) for span, offset in group.spans.items()}
        if stated != computed:
            name = min(n for n in stated.keys() | computed.keys() if stated.get(n) != computed.get(n))
            raise UserError(
                f"{file}: (first element, number of elements) of {name} in the flat buffer must be "
                f"{computed.get(name) or 'none'}, as the model of --config requires, but the file states "
                f"{stated.get(name) or 'none'}. {_OTHER_CONFIG}"
            )
        return group

    def _check_shapes(self, file: Path, shapes: Mapping[str, Sequence[int]], expected: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if tuple(shape) != expected.get(name):
                required = f"the shape {list(expected[name])} on each rank" if name in expected else "no entry in this model"
                raise UserError(f"{file}: {name} must have {required}, but it has the shape {list(shape)}. {_OTHER_CONFIG}")


def _ep_size_of(settings: Tree) -> int:
    match = re.fullmatch(r"ep_size_(\d+)", str(settings.get("name", ""))) if settings.get("moe") else None
    return int(match[1]) if match else 1
