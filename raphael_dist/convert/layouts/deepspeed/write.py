"""Plans the files that DeepSpeed 0.19's `load_checkpoint` reads, for any number of ranks, ZeRO stage and expert sharding.

    PATH/latest
    PATH/global_step100/mp_rank_00_model_states.pt                              weights in train.dtype
    PATH/global_step100/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt        fp32 weights and moments of rank R
    PATH/global_step100/manifest.json, ema-*.safetensors                        of this project; DeepSpeed ignores them

The model file has only the experts of rank 0, since DeepSpeed saves this file on rank 0 alone. The experts of other ranks
are in the optim_states files of those ranks, as fp32 weights. So with sharded experts, call `Fragments.sync_model` (in
engine/fragments.py) after `load_checkpoint`: it copies the fp32 weights into the model on every rank.
"""

from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import torch

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.checkpoint.tensors import Span
from raphael_dist.config.schema import Config, stored_tree
from raphael_dist.convert.layout_manifest import base_manifest
from raphael_dist.convert.layouts.canonical import kind_files
from raphael_dist.convert.write_plan import (
    STEP,
    ZEROS,
    ConversionPlan,
    Entry,
    Options,
    OutFile,
    Piece,
    Source,
    entries_of,
    piece,
    progress_of_target,
)
from raphael_dist.convert.zero_partition import groups, local, parallel_config, topology_of, zero3
from raphael_dist.engine import ds_config
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.storage.versions import versions

Tree = dict[str, Any]  # of dicts, lists and plain values, with an Entry for each tensor


class _Target:
    """What all files of a conversion depend on: the configuration, the division over ranks, and the progress (step, ...)."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.config: Config = parallel_config(source.config, options)
        train = self.config.train
        self.dtype = getattr(torch, train.dtype)
        batch = BatchPlan.of(self.config, options.world)
        json_tree = {"zero_optimization": {"stage": options.stage}}
        self.ds_config = ds_config.merge(self.config, json_tree, batch.accumulation, options.world)
        # With bfloat16 and gradients summed in float32, stage 1 uses another DeepSpeed class, which does not pad parameters.
        self.bf16_optimizer = options.stage == 1 and ds_config.sums_in_float32(train.dtype, batch.accumulation)
        self.topology = topology_of(self.config, options, aligned=not self.bf16_optimizer)
        self.progress, self.notes = progress_of_target(source)
        self.adam = self.config.optim.has_moments

    def moment(self, kind: str) -> str:
        return kind if kind in self.source.kinds() else ZEROS


def plan(source: Source, options: Options, path: Path) -> ConversionPlan:
    """Return the plan for converting the checkpoint `source` to files that DeepSpeed's `load_checkpoint` reads.

    `options`: number of ranks, ZeRO stage and expert parallelism. `path` is not used: the paths in the plan are relative to
    the new folder.
    Raises UserError if the model or DeepSpeed does not allow the ranks, ZeRO stage or expert parallelism in `options`.
    """
    target = _Target(source, options)
    folder, stage = f"global_step{target.progress.step}", options.stage
    ranks = range(options.world)
    files = [_model_file(target, folder, rank) for rank in (ranks if stage == 3 else range(1))]
    if stage > 0:
        state = _zero3_state if stage == 3 else _zero12_state
        files += [_zero_file(target, folder, rank, state(target, rank)) for rank in ranks]
    small = {"latest": folder.encode()}
    if "ema" in source.kinds():
        ema_files, index = kind_files(source, "ema", options.part_bytes)
        files += [OutFile(f"{folder}/{f.name}", f.entries, f.metadata) for f in ema_files]
        small |= {f"{folder}/{name}": data for name, data in index.items()}
    manifest = base_manifest("deepspeed", source) | {
        **target.progress.as_manifest(),
        "world_size": options.world,
        "zero_stage": stage,
        "config": stored_tree(target.config),
    }
    return ConversionPlan(files, source.kinds(), f"{folder}/{MANIFEST}", manifest, small, target.notes)


def _tree_file(name: str, tree: Tree) -> OutFile:
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
        "skipped_steps": target.progress.step - target.progress.updates,
        "global_steps": target.progress.step,
        "global_samples": target.progress.step * target.ds_config["train_batch_size"],
        "dp_world_size": options.world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": target.ds_config,
        "ds_version": versions()["deepspeed"],
    }
    if any(target.topology.ep_size(name) > 1 for name in source.shapes):
        model = source.config.model
        tree |= {"num_experts": [model.space_experts + model.time_experts], "ds_autoep_layers": None}
    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if options.stage == 3 else "mp_rank_00_model_states.pt"
    return _tree_file(f"{folder}/{name}", tree)


def _module(target: _Target) -> "OrderedDict[str, Entry]":
    weights: OrderedDict[str, Entry] = OrderedDict()
    for name, shape in target.source.shapes.items():
        if target.options.stage == 3:
            weights[name] = Entry(name, (0,), (), target.dtype)  # ZeRO-3 keeps the weights in its own files
            continue
        here, first = local(name, shape, target.topology, 0)
        values = Piece("master", Span(name, first, prod(here)), duplicate=target.options.stage != 0)
        weights[name] = Entry(name, here, (values,), target.dtype)
    return weights


def _param_shapes(target: _Target, rank: int) -> list["OrderedDict[str, torch.Size]"]:
    if target.options.stage == 3:
        return [OrderedDict((name, torch.Size(shape)) for name, shape in target.source.shapes.items())]
    by_ep_size = groups(target.source.shapes, target.topology, rank)
    return [OrderedDict((name, torch.Size(shape)) for name, shape in g.shapes.items()) for g in by_ep_size]


# ---- the optimizer's file --------------------------------------------------------------------------------------------


def _zero_file(target: _Target, folder: str, rank: int, state: Tree) -> OutFile:
    prefix = "bf16_" if target.dtype == torch.bfloat16 else ""
    tree = {"optimizer_state_dict": state, "ds_config": target.ds_config, "ds_version": versions()["deepspeed"]}
    return _tree_file(f"{folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", tree)


def _flat(kind: str, spans: dict[Span, int], size: int) -> Entry:
    """Plan the flat buffer of one rank: `size` elements, which are zero except for ranges of parameters.

    `kind`: kind of the values, such as "master" (fp32 weights). `spans`: the ranges, each with its offset in the buffer.
    """
    pieces, at = [], 0
    for span, offset in spans.items():
        if offset > at:
            pieces.append(piece(ZEROS, "", 0, offset - at))
        pieces.append(Piece(kind, span))
        at = offset + span.numel
    if size > at:
        pieces.append(piece(ZEROS, "", 0, size - at))
    return Entry(kind, (size,), tuple(pieces))


def _state(target: _Target, spans: dict[Span, int], size: int) -> Tree:
    if not target.adam:
        return {}
    step = Entry("step", (), (piece(STEP, "", target.progress.updates, 1),))
    return {"step": step, **{kind: _flat(target.moment(kind), spans, size) for kind in MOMENTS}}


def _settings(target: _Target, index: int | list[int], ep_size: int = 1) -> Tree:
    """Return the settings of a parameter group as in the `state_dict` of torch's optimizer.

    `target`: its configuration has the settings of the optimizer. `index`: number of the group's only parameter, or a list
    of its parameters' numbers. `ep_size`: number of ranks over which the group's experts are sharded; 1: the group has no
    sharded experts.
    """
    model = torch.nn.Parameter(torch.zeros(1))
    optim = target.config.optim
    optimizer: torch.optim.Optimizer
    if target.adam:
        # Fused as in the engine: the loaded settings decide which kernel runs, and kernels round differently.
        optimizer = torch.optim.AdamW(
            [model], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD([model], lr=optim.lr)
    settings = dict(optimizer.state_dict()["param_groups"][0])
    if ep_size > 1:
        settings |= {"moe": True, "name": f"ep_size_{ep_size}"}
    return settings | {"params": index if isinstance(index, list) else [index]}


def _zero12_state(target: _Target, rank: int) -> Tree:
    from deepspeed.utils.tensor_fragment import fragment_address

    by_ep_size = groups(target.source.shapes, target.topology, rank)
    optimizer = {
        "state": {i: _state(target, g.spans, g.per_rank_padded) for i, g in enumerate(by_ep_size)} if target.adam else {},
        "param_groups": [_settings(target, i, g.ep_size) for i, g in enumerate(by_ep_size)],
    }
    sizes = [g.per_rank_padded if target.bf16_optimizer else g.per_rank for g in by_ep_size]
    state: Tree = {
        "clip_grad": target.config.optim.max_grad_norm,
        "base_optimizer_state": optimizer,
        "single_partition_of_fp32_groups": [_flat("master", g.spans, n) for g, n in zip(by_ep_size, sizes, strict=True)],
        "group_paddings": [g.per_rank_padded - g.per_rank for g in by_ep_size],
        "partition_count": [g.ranks for g in by_ep_size],
        "ds_version": versions()["deepspeed"],
        "param_slice_mappings": [
            OrderedDict((span.name, fragment_address(numel=span.numel, start=at)) for span, at in g.spans.items())
            for g in by_ep_size
        ],
    }
    if not target.bf16_optimizer:
        state |= _loss_scale(target.options.stage) | {"param_alignment_paddings": [g.paddings for g in by_ep_size]}
    return state


def _zero3_state(target: _Target, rank: int) -> Tree:
    spans, size = zero3(target.source.shapes, target.options.world, rank)
    return {
        **_loss_scale(target.options.stage),
        "partition_count": target.options.world,
        "optimizer_state_dict": {
            "state": {0: _state(target, spans, size)} if target.adam else {},
            "param_groups": [_settings(target, 0)],
        },
        "fp32_flat_groups": [_flat("master", spans, size)],
    }


def _loss_scale(stage: int) -> Tree:
    """Return the entries that DeepSpeed saves for its loss scale (constant 1) and the ZeRO stage."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    scale = {"loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False, "overflow": False}
    return {**scale, "zero_stage": ZeroStageEnum(stage)}


def _plain_optimizer(target: _Target) -> Tree:
    state = {}
    for i, (name, shape) in enumerate(target.source.shapes.items()):
        flat = _state(target, {Span(name, 0, prod(shape)): 0}, prod(shape))
        # Under ZeRO-0, moments have the shape of their parameter.
        state[i] = {k: Entry(k, shape, e.pieces, e.dtype) if k in MOMENTS else e for k, e in flat.items()}
    indices = list(range(len(target.source.shapes)))
    return {"state": state if target.adam else {}, "param_groups": [_settings(target, indices)]}
