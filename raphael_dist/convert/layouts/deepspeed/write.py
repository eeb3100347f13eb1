"""Plans the files that DeepSpeed 0.19's `load_checkpoint` reads, for any number of ranks, expert parallelism and ZeRO stage.

    PATH/latest
    PATH/global_step100/mp_rank_00_model_states.pt                              weights in the type of training
    PATH/global_step100/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt        fp32 weights and moments of rank R
    PATH/global_step100/manifest.json, ema-*.safetensors                        ours; DeepSpeed passes them by

The model file holds the experts of rank 0, as DeepSpeed saves our stacked layers; the other ranks' are in their ZeRO files,
so after `load_checkpoint` with spread experts `Fragments.publish` brings every rank's weights up to date.
"""

from collections import OrderedDict
from math import prod
from typing import Any

import torch

from raphael_dist.config import Config
from raphael_dist.convert.layouts.canonical import kind_files
from raphael_dist.convert.layouts.raphael import alignment, parallel_config, topology_of
from raphael_dist.convert.manifest import base_manifest
from raphael_dist.convert.partition import Group, Slot, groups, local, zero3
from raphael_dist.convert.plan import STEP, ZEROS, Entry, Options, OutFile, Plan, Source, Take, entries_of, resumes
from raphael_dist.engine import ds_config
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.parallel.batch_plan import BatchPlan


class _Target:
    """What all files of one conversion need to know."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.config: Config = parallel_config(source.config, options)
        train = self.config.train
        self.dtype = getattr(torch, train.dtype)
        batch = BatchPlan.of(self.config, options.world)
        json_tree = {"zero_optimization": {"stage": options.stage}}
        self.ds_config = ds_config.merge(self.config, json_tree, batch.accumulation, options.world)
        # With bfloat16 and gradients added up in float32, stage 1 is another class of DeepSpeed's, which aligns nothing.
        self.bf16_optimizer = options.stage == 1 and train.dtype == "bfloat16" and batch.accumulation > 1
        aligned = 1 if self.bf16_optimizer else alignment(self.config, options.stage)
        self.topology = topology_of(self.config, options, aligned)
        self.resumes = resumes(source)
        self.adam = self.config.optim.kind == "adamw"
        self.step = source.step if self.resumes else 0
        self.updates = (source.updates or 0) if self.resumes else 0

    def moment(self, kind: str) -> str:
        return kind if kind in self.source.kinds() else ZEROS


def plan(source: Source, options: Options) -> Plan:
    """Plan a folder for DeepSpeed. Raises UserError for a topology that the model or DeepSpeed does not allow."""
    target = _Target(source, options)
    folder = f"global_step{target.step}"
    if options.stage == 0:
        files = [_model_file(target, folder, 0)]
    elif options.stage == 3:
        files = [_model_file(target, folder, rank) for rank in range(options.world)]
        files += [_zero_file(target, folder, rank, _zero3_state(target, rank)) for rank in range(options.world)]
    else:
        files = [_model_file(target, folder, 0)]
        files += [_zero_file(target, folder, rank, _zero12_state(target, rank)) for rank in range(options.world)]
    small = {"latest": folder.encode()}
    if "ema" in source.kinds():
        more, index = kind_files(source, "ema", options.part_bytes)
        files += [OutFile(f"{folder}/{f.name}", f.entries, f.metadata) for f in more]
        small |= {f"{folder}/{name}": data for name, data in index.items()}
    notes = [] if target.resumes else ["exp_avg, exp_avg_sq: not in the source; zero, at step 0"]
    manifest = base_manifest("deepspeed", source) | {
        "step": target.step,
        "samples_seen": source.samples_seen if target.resumes else 0,
        "updates": target.updates,
        "guard": source.guard if target.resumes else {},
        "world_size": options.world,
        "zero_stage": options.stage,
        "config": target.config.model_dump(mode="json"),
    }
    return Plan("deepspeed", files, source.kinds(), f"{folder}/manifest.json", manifest, small, notes)


def _tree_file(name: str, tree: dict[str, Any]) -> OutFile:
    return OutFile(name, tuple(entries_of(tree)), tree=tree)


# ---- the model's file ------------------------------------------------------------------------------------------------


def _model_file(target: _Target, folder: str, rank: int) -> OutFile:
    options, source = target.options, target.source
    tree = {
        "module": _module(target),
        "buffer_names": [],
        "optimizer": _plain_optimizer(target) if options.stage == 0 else None,
        "param_shapes": None if options.stage == 0 else _param_shapes(target, rank),
        "frozen_param_shapes": None if options.stage < 2 else OrderedDict(),
        "shared_params": None if options.stage == 0 else {},
        "frozen_param_fragments": None if options.stage < 2 else OrderedDict(),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": target.step - target.updates,
        "global_steps": target.step,
        "global_samples": target.step * target.ds_config["train_batch_size"],
        "dp_world_size": options.world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": target.ds_config,
        "ds_version": _version(),
    }
    if any(target.topology.spread(name) > 1 for name in source.shapes):
        model = source.config.model
        tree |= {"num_experts": [model.space_experts + model.time_experts], "ds_autoep_layers": None}
    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if options.stage == 3 else "mp_rank_00_model_states.pt"
    return _tree_file(f"{folder}/{name}", tree)


def _module(target: _Target) -> "OrderedDict[str, Entry]":
    found: OrderedDict[str, Entry] = OrderedDict()
    for name, shape in target.source.shapes.items():
        if target.options.stage == 3:
            found[name] = Entry(name, (0,), (), target.dtype)  # ZeRO-3 keeps the weights in its own files
            continue
        here, first = local(name, shape, target.topology, 0)
        take = Take("master", name, first, prod(here), copy=target.options.stage != 0)
        found[name] = Entry(name, here, (take,), target.dtype)
    return found


def _param_shapes(target: _Target, rank: int) -> list["OrderedDict[str, torch.Size]"]:
    if target.options.stage == 3:
        return [OrderedDict((name, torch.Size(shape)) for name, shape in target.source.shapes.items())]
    found = groups(target.source.shapes, target.topology, rank)
    return [OrderedDict((name, torch.Size(shape)) for name, shape in g.shapes.items()) for g in found]


# ---- the optimizer's file --------------------------------------------------------------------------------------------


def _zero_file(target: _Target, folder: str, rank: int, state: dict[str, Any]) -> OutFile:
    prefix = "bf16_" if target.dtype == torch.bfloat16 else ""
    tree = {"optimizer_state_dict": state, "ds_config": target.ds_config, "ds_version": _version()}
    return _tree_file(f"{folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", tree)


def _flat(kind: str, slots: tuple[Slot, ...] | list[Slot], size: int) -> Entry:
    """Return a flat buffer of `size` elements with the slots of one kind in it, zero elsewhere."""
    takes, at = [], 0
    for slot in slots:
        if slot.offset > at:
            takes.append(Take(ZEROS, "", 0, slot.offset - at))
        takes.append(Take(kind, slot.name, slot.start, slot.numel))
        at = slot.offset + slot.numel
    if size > at:
        takes.append(Take(ZEROS, "", 0, size - at))
    return Entry(kind, (size,), tuple(takes))


def _state(target: _Target, slots: tuple[Slot, ...] | list[Slot], size: int) -> dict[str, Any]:
    if not target.adam:
        return {}
    step = Entry("step", (), (Take(STEP, "", target.updates, 1),))
    return {"step": step, **{kind: _flat(target.moment(kind), slots, size) for kind in MOMENTS}}


def _settings(target: _Target, index: int | list[int], spread: int = 1) -> dict[str, Any]:
    """Return a parameter group of torch's optimizer, as its `state_dict` has it."""
    model = torch.nn.Parameter(torch.zeros(1))
    optim = target.config.optim
    made: torch.optim.Optimizer
    if target.adam:
        made = torch.optim.AdamW([model], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    else:
        made = torch.optim.SGD([model], lr=optim.lr)
    found = dict(made.state_dict()["param_groups"][0])
    if spread > 1:
        found |= {"moe": True, "name": f"ep_size_{spread}"}
    return found | {"params": index if isinstance(index, list) else [index]}


def _zero12_state(target: _Target, rank: int) -> dict[str, Any]:
    import deepspeed.runtime.zero.config as zero
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    found = groups(target.source.shapes, target.topology, rank)
    optimizer = {
        "state": {i: _state(target, g.slots, g.part) for i, g in enumerate(found)} if target.adam else {},
        "param_groups": [_settings(target, i, g.spread) for i, g in enumerate(found)],
    }
    state: dict[str, Any] = {
        "clip_grad": target.config.optim.clip,
        "base_optimizer_state": optimizer,
        "single_partition_of_fp32_groups": [_flat("master", g.slots, _saved(target, g)) for g in found],
        "group_paddings": [g.part - g.lean for g in found],
        "partition_count": [g.ranks for g in found],
        "ds_version": _version(),
        "param_slice_mappings": [OrderedDict((s.name, _address(s)) for s in g.slots) for g in found],
    }
    if not target.bf16_optimizer:
        stage = zero.ZeroStageEnum.gradients if target.options.stage == 2 else zero.ZeroStageEnum.optimizer_states
        state |= {"loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False, "overflow": False, "zero_stage": stage}
        state["param_alignment_paddings"] = [g.paddings for g in found]
    return state


def _saved(target: _Target, group: Group) -> int:
    return group.part if target.bf16_optimizer else group.lean


def _address(slot: Slot) -> Any:
    from deepspeed.utils.tensor_fragment import fragment_address

    return fragment_address(numel=slot.numel, start=slot.offset)


def _zero3_state(target: _Target, rank: int) -> dict[str, Any]:
    import deepspeed.runtime.zero.config as zero
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    slots, size = zero3(target.source.shapes, target.options.world, rank)
    return {
        "zero_stage": zero.ZeroStageEnum.weights,
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": target.options.world,
        "optimizer_state_dict": {
            "state": {0: _state(target, slots, size)} if target.adam else {},
            "param_groups": [_settings(target, 0)],
        },
        "fp32_flat_groups": [_flat("master", slots, size)],
    }


def _plain_optimizer(target: _Target) -> dict[str, Any]:
    state = {}
    for i, (name, shape) in enumerate(target.source.shapes.items()):
        one = _state(target, [Slot(name, 0, prod(shape), 0)], prod(shape))
        # Moments have their parameter's shape here.
        state[i] = {k: Entry(k, shape, e.takes, e.dtype) if k in MOMENTS else e for k, e in one.items()}
    indices = list(range(len(target.source.shapes)))
    return {"state": state if target.adam else {}, "param_groups": [_settings(target, indices)]}


def _version() -> str:
    from importlib.metadata import version

    return version("deepspeed")
