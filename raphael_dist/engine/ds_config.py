"""Merges this project's settings into the user's DeepSpeed JSON, and checks that they do not contradict each other.

The JSON in `ds_configs/` determines ZeRO, offload, communication and profiling. This project's configuration determines
batch sizes, clipping, precision, optimizer and schedule. If the JSON has another value for one of these, the error shows
both values. This module does not import torch, so that `--plan` starts fast.
"""

import json
from collections.abc import Callable
from pathlib import Path

from raphael_dist.config.assets import locate
from raphael_dist.config.schema import Config
from raphael_dist.config.types import EXPERT_KINDS, Dtype, ExpertKind
from raphael_dist.engine.ds_keys import Tree, check_keys, without_unset
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.text import parse_json, read_text, shorten

RequirementError = Callable[[str, str, str], UserError]  # requirement, what there is, and remedy
CONTIGUOUS_BUCKET = 2_000_000_000  # elements; our reduce_bucket_size where gradients may be contiguous


def read_deepspeed_json(path: str | None, dtype: Dtype = "float32") -> Tree:
    """Read the user's DeepSpeed JSON; return it as a dict.

    Args:
        path: the file. None: return a default configuration, which is ZeRO-2 for bfloat16 and ZeRO-1 for float32. (ZeRO-1
            is worse in bfloat16 if a step has several micro-steps: every rank keeps the sum of all gradients in float32, and
            gradients are reduced only after the backward pass.)
        dtype: `train.dtype`, for the default configuration.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    if path is None:
        return {"zero_optimization": {"stage": 2 if dtype == "bfloat16" else 1}}
    file = Path(locate(path))
    if not file.is_file():
        raise UserError(f"--deepspeed_config={path} must be an existing file, but {_describe_missing(path)}")
    try:
        tree = parse_json(read_text(file), _unique_keys)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--deepspeed_config={path} cannot be read as JSON: {error}. Correct this file, or use ds_configs/zero2.json."
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--deepspeed_config={path} must contain a JSON object, but it contains {shorten(json.dumps(tree))}. Use e.g. "
            "ds_configs/zero2.json."
        )
    return tree


def _describe_missing(path: str) -> str:
    if Path(path).is_dir():
        return f"it is a folder. Give one file, e.g. {path.rstrip('/')}/zero2.json."
    shipped = f"ds_configs/{Path(path).name.removesuffix('.json')}.json"
    hint = f" (did you mean {shipped!r}?)" if Path(locate(shipped)).is_file() else ""
    return f"there is no such file{hint}. Give the path of a file, e.g. ds_configs/zero2.json."


def _unique_keys(pairs: list[tuple[str, object]]) -> Tree:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{repeated[0]!r} occurs twice in one object")
    return dict(pairs)


def zero_stage(tree: Tree) -> int:
    """Return the ZeRO stage (0 to 3) of the DeepSpeed configuration `tree`; 0 if it has none.

    Raises UserError for another value.
    """
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(
            f"zero_optimization.stage={json.dumps(stage)} in the DeepSpeed JSON must be 0, 1, 2 or 3. Write e.g. "
            '"zero_optimization": {"stage": 2}.'
        )
    return int(stage)


def sums_in_float32(dtype: Dtype, accumulation: int) -> bool:
    """Return whether the gradients of a step's micro-steps are added up in float32 instead of in `dtype`.

    True for bfloat16 and several micro-steps (`accumulation`): rounding a bfloat16 sum would lose most later gradients.
    """
    return dtype == "bfloat16" and accumulation > 1


def uses_contiguous_gradients(
    stage: int, *, overlap: bool, offload: bool, elements: int = 0, bucket: int = CONTIGUOUS_BUCKET
) -> bool:
    """Return whether gradients lie in flat buffers that are reduced without copies (`engine.zero.Zero12Contiguous`).

    False with `offload`, because the buffers stay on the device. Otherwise True for ZeRO-1, and for ZeRO-2 if `overlap` is
    True or `elements` <= 2 * `bucket`: for larger models, the two buckets of DeepSpeed's own reduction need less memory.

    Args:
        stage: ZeRO stage.
        overlap: whether gradients are reduced during the backward pass (`overlap_comm`).
        offload: whether gradients are moved off the device.
        elements: number of parameters of the model on this rank; 0: unknown; treated as a small model.
        bucket: reduce_bucket_size, in elements.
    """
    return stage in (1, 2) and not offload and (stage == 1 or overlap or elements <= 2 * bucket)


def reduces_in_backward(tree: Tree, world_size: int) -> bool:
    """Return whether ZeRO-1 or 2 reduces gradients in the backward pass: with `overlap_comm` and several ranks."""
    return bool(world_size > 1 and zero_stage(tree) in (1, 2) and tree["zero_optimization"].get("overlap_comm"))


def offload_device(tree: Tree, name: str = "offload_optimizer") -> str | None:
    """Return the device to which a DeepSpeed JSON offloads the optimizer state (or weights), e.g. "cpu"; None: no offload.

    `tree`: the JSON as a dict. `name`: the key in its section zero_optimization, "offload_optimizer" or, for the weights,
    "offload_param".
    """
    section = tree.get("zero_optimization", {}).get(name)
    device = section.get("device") if isinstance(section, dict) else None
    return None if device == "none" else device


def merge(config: Config, tree: Tree, accumulation: int, world_size: int) -> Tree:
    """Return the full DeepSpeed configuration: the user's JSON, plus the keys that this project determines.

    Args:
        config: the run's configuration.
        tree: the user's JSON.
        accumulation: micro-steps per optimizer step.
        world_size: number of ranks.

    Raises:
        UserError: `tree` contradicts `config`, or has a key that is not supported.
    """
    train = config.train
    merged = without_unset(tree)
    check_keys(merged)
    # DeepSpeed requires micro-batch size x accumulation x ranks as train_batch_size, which counts empty slots too.
    if merged.get("train_batch_size", train.global_batch_size) != train.global_batch_size:
        raise _contradiction(
            "train_batch_size", merged["train_batch_size"], "train.global_batch_size", train.global_batch_size
        )
    _set_owned(merged, "train_micro_batch_size_per_gpu", train.micro_batch_size, "train.micro_batch_size")
    _set_owned(merged, "gradient_accumulation_steps", accumulation, "train.global_batch_size")
    _set_owned(merged, "gradient_clipping", config.optim.max_grad_norm, "optim.max_grad_norm")
    _set_owned(merged, "bf16.enabled", train.dtype == "bfloat16", "train.dtype")
    _set_owned(merged, "fp16.enabled", False, "train.dtype (float32 or bfloat16)")
    merged["train_batch_size"] = train.micro_batch_size * accumulation * world_size
    zero = merged.setdefault("zero_optimization", {"stage": 0})
    if zero_stage(merged) in (1, 2):
        # Rounds every parameter up to 16 bytes in the flat buffer, as the grouped product on GPUs requires.
        zero.setdefault("parameter_alignment", True)
    overlap, offload = bool(zero.get("overlap_comm")), bool(offload_device(merged))
    if uses_contiguous_gradients(zero_stage(merged), overlap=overlap, offload=offload):
        zero.setdefault("reduce_bucket_size", CONTIGUOUS_BUCKET)
    if sums_in_float32(train.dtype, accumulation):
        merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("steps_per_print", 10**9)
    # The timer waits for the GPU twice per micro-step, for numbers that only `steps_per_print` shows.
    _section(merged, "timers", "throughput").setdefault("enabled", False)
    _check(config, merged, accumulation, world_size)
    return merged


def _check(config: Config, merged: Tree, accumulation: int, world_size: int) -> None:
    """Raise UserError for combinations of settings that DeepSpeed or this package does not support."""
    stage = zero_stage(merged)
    if stage == 0 and config.train.dtype == "bfloat16":
        raise UserError(
            "train.dtype=bfloat16 requires ZeRO stage 1, 2 or 3, but the DeepSpeed JSON has stage 0, which does not clip "
            "the gradients of float32 master weights correctly. Use ds_configs/zero2.json, which takes no more memory than "
            "stage 0 on one GPU, or set train.dtype=float32."
        )
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = offload_device(merged, name)
        if device and stage not in stages:
            raise UserError(
                f"zero_optimization.{name}.device={device} in the DeepSpeed JSON requires stage "
                f"{' or '.join(map(str, stages))}, but zero_optimization.stage is {stage}. Set the stage to {stages[0]}, "
                f"or remove zero_optimization.{name}."
            )
    check_expert_parallel(config, merged, world_size)
    if reduces_in_backward(merged, world_size):
        _check_contiguous(overlap_error, config, merged, accumulation)
    if config.train.cuda_graphs:
        _check_contiguous(cuda_graphs_error, config, merged, accumulation)
        _check_capture(config, merged)
    if "adamw" in config.train.kernels:
        _check_contiguous(fused_update_error, config, merged, accumulation)
    if config.optim.kind == "muon" and stage != 0:
        _check_contiguous(muon_error, config, merged, accumulation)


def fit_to_ranks(config: Config, world_size: int) -> Config:
    """Return a copy of the configuration with micro-batch and expert-parallel sizes that suit the number of ranks.

    If one micro-step is enough for the global batch, train.micro_batch_size is lowered to the smallest value with which one
    micro-step is still enough (except in runs with train.stages). With parallel.elastic=true, parallel.space_ep and
    parallel.time_ep become the largest values that `world_size` ranks allow, up to the configured values.

    Raises UserError if there are more ranks than samples in a global batch.
    """
    if world_size < 1:
        return config
    if config.parallel.elastic:
        sizes = {}
        for kind in EXPERT_KINDS:
            allowed = _allowed_sizes(config, kind, world_size)
            sizes[f"{kind}_ep"] = max(size for size in allowed if size <= config.parallel.ep(kind))
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})
    if not config.train.stages:
        micro = BatchPlan.of(config, world_size).without_spare_slots().micro_batch_size
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})
    return config


def _allowed_sizes(config: Config, kind: ExpertKind, world_size: int) -> list[int]:
    """Return, ascending, all numbers of ranks over which the "space" or "time" experts (`kind`) can be sharded."""
    experts = config.model.num_experts(kind)
    return [n for n in range(1, max(1, experts) + 1) if experts % n == 0 and world_size % n == 0]


def check_expert_parallel(config: Config, tree: Tree, world_size: int) -> None:
    """Raise UserError if expert parallelism does not suit the number of ranks, the DeepSpeed JSON or the expert backend.

    `config`: the run's configuration. `tree`: the DeepSpeed configuration, from `merge`. `world_size`: number of ranks.
    """
    for kind in EXPERT_KINDS:
        size = config.parallel.ep(kind)
        if world_size % size:
            raise UserError(
                f"parallel.{kind}_ep={size} must divide the number of ranks ({world_size}) and "
                f"model.{kind}_experts={config.model.num_experts(kind)}. Set parallel.{kind}_ep to one of "
                f"{_allowed_sizes(config, kind, world_size)}, use {-(-world_size // size) * size} ranks, or set "
                "parallel.elastic=true."
            )
    if not config.parallel.uses_expert_parallelism:
        return
    stage, overlap = zero_stage(tree), tree["zero_optimization"].get("overlap_comm") is True
    backend = config.model.expert_backend
    sizes = " ".join(f"parallel.{k}_ep={config.parallel.ep(k)}" for k in EXPERT_KINDS if config.parallel.ep(k) > 1)
    if stage == 0:
        needs = "ZeRO stage 1 or 2, but the DeepSpeed JSON has stage 0, whose gradient norm is wrong for sharded experts"
    elif stage == 3:
        needs = "ZeRO stage 1 or 2, but the DeepSpeed JSON has stage 3, which cannot partition sharded experts"
    elif overlap:
        # Gradients would be reduced while rows of experts are sent, in an order that can differ between ranks, and hang.
        needs = "overlap_comm=false, but it is true in the DeepSpeed JSON, which can make ranks hang"
    elif config.parallel.space_ep > 1 and backend == "reference":
        raise UserError(
            f"{sizes} requires model.expert_backend=auto, grouped or dense, but the backend is {backend}, which cannot send "
            "tokens to other ranks. Set model.expert_backend=auto, or set parallel.space_ep=1."
        )
    else:
        return
    raise UserError(
        f"{sizes} (expert parallelism) requires {needs}. Use ds_configs/zero2.json or set parallel.space_ep=1 "
        "parallel.time_ep=1."
    )


def _check_contiguous(error: RequirementError, config: Config, tree: Tree, accumulation: int) -> None:
    """Raise the UserError that the function `error` creates if the settings do not allow gradients in flat buffers."""
    stage, offload = zero_stage(tree), offload_device(tree)
    remedy = "Use ds_configs/zero2.json"
    if stage not in (1, 2):
        raise error("ZeRO stage 1 or 2", f"the DeepSpeed config has stage {stage}", remedy)
    if offload is not None:
        actual = f"the DeepSpeed config has offload_optimizer.device={offload}"
        raise error("the optimizer on the GPU", actual, remedy)
    if stage == 1 and sums_in_float32(config.train.dtype, accumulation):
        # ZeRO-1 accumulates these gradients in other tensors.
        actual = f"the DeepSpeed config has stage 1 and a step has {accumulation} micro-steps"
        raise error("ZeRO stage 2 if a step has several micro-steps", actual, remedy)


def _check_capture(config: Config, tree: Tree) -> None:
    """Raise UserError if CUDA graphs cannot capture the model's forward and backward passes."""
    model, train, parallel = config.model, config.train, config.parallel
    if tree["zero_optimization"].get("overlap_comm"):
        raise cuda_graphs_error("overlap_comm=false", "it is true in the DeepSpeed config", "Use ds_configs/zero2.json")
    if parallel.uses_expert_parallelism:
        actual = f"parallel.space_ep={parallel.space_ep} and parallel.time_ep={parallel.time_ep} shard them"
        raise cuda_graphs_error("all experts on every rank", actual, "Set parallel.space_ep=1 parallel.time_ep=1")
    if config.trains_adapter_only:
        part = "control.enabled=true trains only the ControlNet"
        actual = part if config.control.enabled else f"lora.rank={config.lora.rank} trains only the LoRA adapters"
        raise cuda_graphs_error("training of all weights", actual, "Set lora.rank=0 control.enabled=false")
    if train.check_gradients:
        raise cuda_graphs_error("train.check_gradients=false", "it is true", "Set train.check_gradients=false")
    # Without the grouped product the host reads how many rows each expert has, which a graph cannot contain.
    if model.time_experts and not config.fits_grouped_product:
        widths = f"model.channels={list(model.channels)}, model.expert_width={list(model.expert_width)}"
        raise cuda_graphs_error(
            "train.dtype=bfloat16, and multiples of 8 in model.channels and model.expert_width",
            f"the configuration has train.dtype={train.dtype}, {widths}",
            "Set train.dtype=bfloat16 and such widths",
        )
    if model.space_experts and model.expert_backend not in ("auto", "dense"):
        raise cuda_graphs_error(
            "model.expert_backend=auto or dense", f"it is {model.expert_backend}", "Set model.expert_backend=auto"
        )


def _requirement_error(requires: str, without: str) -> RequirementError:
    """Return a function that creates a UserError: a setting has a requirement that is not met.

    That function's arguments: the requirement ("a GPU"), the fact ("the device is cpu"), the remedy ("Use a GPU").
    `requires`: the words before the requirement ("X=true requires"). `without`: how to switch the setting off.
    """

    def error(requirement: str, actual: str, remedy: str) -> UserError:
        return UserError(f"{requires} {requirement}, but {actual}. {remedy}, or {without}.")

    return error


cuda_graphs_error = _requirement_error("train.cuda_graphs=true requires", "set train.cuda_graphs=false")
fused_update_error = _requirement_error("train.kernels with adamw requires", "remove adamw from train.kernels")
overlap_error = _requirement_error("overlap_comm=true in the DeepSpeed JSON requires", "set overlap_comm=false")
muon_error = _requirement_error("optim.kind=muon (which computes with whole matrices) requires", "set optim.kind=adamw")


def _section(merged: Tree, *names: str) -> Tree:
    node = merged
    for name in names:
        node = node.setdefault(name, {})
    return node


def _set_owned(merged: Tree, dotted: str, value: bool | float, owner: str) -> None:
    """Set the key `dotted` to `value`, that of our setting `owner`. Raise UserError if the JSON has another value."""
    *sections, key = dotted.split(".")
    node = _section(merged, *sections)
    if node.get(key, value) != value:
        raise _contradiction(dotted, node[key], owner, value)
    node[key] = value


def _contradiction(key: str, json_value: object, owner: str, value: object) -> UserError:
    return UserError(
        f"{key}={json.dumps(json_value)} in the DeepSpeed JSON must be {json.dumps(value)}, because {owner} determines it. "
        f"Remove {key} from the JSON, or change {owner}."
    )
