"""The part of the DeepSpeed configuration that we own, merged into the user's JSON.

The JSON in `ds_configs/` owns ZeRO, offload, communication and profiling. Batch sizes, clipping, precision, optimizer
and schedule belong to our configuration: the same key in the JSON with another value is an error that shows both.
"""

import json
from pathlib import Path
from typing import Any

from raphael_dist.config import Config
from raphael_dist.config_adapters import beside
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.shipped import located

_NOT_OURS = {
    "optimizer": "use optim.* of the configuration",
    "scheduler": "use optim.warmup_steps and optim.decay",
    "elasticity": "any world size serves train.global_batch already",
    "checkpoint": "checkpoints are written by raphael_dist; use checkpoint.*",
    "amp": "use train.dtype",
    "data_efficiency": "the data order is a function of run.seed",
    "curriculum_learning": "the data order is a function of run.seed",
}

REDUCE_BUCKET = 2_000_000_000  # numbers, of `collects`

# What a JSON may say at its top; DeepSpeed itself ignores a mistyped key and silently runs without it.
_KNOWN = (
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "fp16", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print",
    "timers", "activation_checkpointing", "compile",
)  # fmt: skip


def read_deepspeed_json(path: str | None, dtype: str = "float32") -> dict[str, Any]:
    """Read a DeepSpeed JSON; None means the ZeRO stage that suits `train.dtype`.

    In bfloat16 that is 2: DeepSpeed's ZeRO-1 keeps the sum of all gradients in float32 on every rank, begins most
    parameters at addresses that the grouped product must copy from, and reduces everything after the backward pass. Raises
    UserError when the file is missing or not a JSON object.
    """
    if path is None:
        return {"zero_optimization": {"stage": 2 if dtype == "bfloat16" else 1}}
    file = Path(located(path))
    if not file.is_file():
        raise UserError(f"--deepspeed_config {path}: no such file")
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed_config {path}: must be a JSON object, got {type(tree).__name__}")
    return tree


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration (0 when it names none)."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage in the DeepSpeed JSON: given {stage!r}, allowed 0, 1, 2, 3")
    return int(stage)


def merge(config: Config, tree: dict[str, Any], accumulation: int, world_size: int) -> dict[str, Any]:
    """Return the full DeepSpeed configuration. Raises UserError when `tree` contradicts `config`."""
    micro = config.train.micro_batch
    ours: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "derived from train.global_batch"),
        "gradient_clipping": (config.optim.clip, "optim.clip"),
        "bf16.enabled": (config.train.dtype == "bfloat16", "train.dtype"),
        "fp16.enabled": (False, "train.dtype (float32 or bfloat16)"),
    }
    for key, fix in _NOT_OURS.items():
        if key in tree:
            raise UserError(f"{key} in the DeepSpeed JSON is not used: {fix}; remove it there")
    # DeepSpeed wants the product of its three numbers, which counts the padded slots of the last micro-step too.
    if tree.get("train_batch_size", "auto") not in ("auto", config.train.global_batch):
        _contradiction("train_batch_size", tree["train_batch_size"], "train.global_batch", config.train.global_batch)
    for key in tree:
        if key not in _KNOWN and not key.startswith("_"):
            raise UserError(f"{key} in the DeepSpeed JSON is unknown{did_you_mean(key, _KNOWN)}; known: {', '.join(_KNOWN)}")
    merged = json.loads(json.dumps(tree))
    for key, (value, owner) in ours.items():
        _set_owned(merged, key, value, owner)
    merged["train_batch_size"] = micro * accumulation * world_size
    merged.setdefault("zero_optimization", {"stage": 0})
    if zero_stage(merged) in (1, 2):
        # Rounds every parameter to 16 bytes in the flat buffer: the grouped product on GPUs refuses less.
        merged["zero_optimization"].setdefault("parameter_alignment", True)
    if collects(merged):
        # Up to twice as many gradients are reduced at once (`zero.Collected`).
        merged["zero_optimization"].setdefault("reduce_bucket_size", REDUCE_BUCKET)
    if config.train.dtype == "bfloat16" and accumulation > 1:
        # In bfloat16 the sum over many micro-steps would lose most of what comes late.
        merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("steps_per_print", 10**9)
    # It waits for the GPU twice a micro-step, for numbers that only `steps_per_print` would show.
    _section(merged, "timers", "throughput").setdefault("enabled", False)
    _check(config, merged, accumulation, world_size)
    return merged


def _check(config: Config, merged: dict[str, Any], accumulation: int, world_size: int) -> None:
    """UserError for what goes wrong in DeepSpeed, or with ours, though each may have it."""
    if zero_stage(merged) == 0 and config.train.dtype == "bfloat16":
        raise UserError(
            "train.dtype = bfloat16 needs fp32 master weights, which DeepSpeed's ZeRO-0 does not clip correctly; "
            "use ds_configs/zero2.json (the same memory on one GPU) or train.dtype=float32"
        )
    for name in ("offload_optimizer", "offload_param"):
        if offload_device(merged, name) == "nvme":
            raise UserError(
                f"zero_optimization.{name}.device is 'nvme' in the DeepSpeed JSON: the moving average and checkpoints need "
                "the fp32 weights in memory; use 'cpu' (ds_configs/zero2_offload.json)"
            )
    check_expert_parallel(config, merged, world_size)
    if config.train.cuda_graphs:
        _check_graphs(config, merged, accumulation)


def collects(ds_config: dict[str, Any]) -> bool:
    """Return whether gradients may be reduced at once: where they stay on the device until the backward pass has ended."""
    overlaps = ds_config.get("zero_optimization", {}).get("overlap_comm")
    return zero_stage(ds_config) in (1, 2) and not overlaps and offload_device(ds_config) is None


def offload_device(ds_config: dict[str, Any], name: str = "offload_optimizer") -> str | None:
    """Return where a DeepSpeed configuration moves the optimizer ("offload_param": the weights); None: it does not."""
    given = ds_config.get("zero_optimization", {}).get(name)
    device = given.get("device") if isinstance(given, dict) else None
    return None if device == "none" else device


def fit_to_ranks(config: Config, world_size: int) -> Config:
    """With `parallel.elastic`, return the configuration with the largest space_ep and time_ep that the ranks allow."""
    if not config.parallel.elastic or world_size < 1:
        return config
    sizes = {}
    for kind in ("space", "time"):
        ep = getattr(config.parallel, f"{kind}_ep")
        sizes[f"{kind}_ep"] = max(n for n in _allowed(config, kind, world_size) if n <= ep)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def _allowed(config: Config, kind: str, world_size: int) -> list[int]:
    """Return over how many ranks the experts of a kind can be spread, ascending."""
    experts = getattr(config.model, f"{kind}_experts")
    return [n for n in range(1, max(1, experts) + 1) if experts % n == 0 and world_size % n == 0]


def check_expert_parallel(config: Config, tree: dict[str, Any], world_size: int) -> None:
    """Raise UserError when experts cannot be spread as `parallel` says over the ranks, or not under this DeepSpeed JSON."""
    sizes = {kind: getattr(config.parallel, f"{kind}_ep") for kind in ("space", "time")}
    for kind, size in sizes.items():
        if world_size % size:
            experts, allowed = getattr(config.model, f"{kind}_experts"), _allowed(config, kind, world_size)
            raise UserError(
                f"parallel.{kind}_ep = {size} must divide the number of ranks ({world_size}) as well as "
                f"model.{kind}_experts = {experts}; allowed on {world_size} ranks: {allowed}; "
                f"or use {-(-world_size // size) * size} ranks, or parallel.elastic=true"
            )
    spread = " and ".join(f"parallel.{kind}_ep = {size}" for kind, size in sizes.items() if size > 1)
    if not spread:
        return
    for wrong, why in _forbidden_with_experts(config, tree):
        if wrong:
            raise UserError(f"{spread}: {why}; or set parallel.space_ep=1 parallel.time_ep=1")


def _forbidden_with_experts(config: Config, tree: dict[str, Any]) -> list[tuple[bool, str]]:
    zero, stage = tree["zero_optimization"], zero_stage(tree)
    remedy = "use zero_optimization.stage 1 or 2 (ds_configs/zero1.json, zero2.json)"
    return [
        (stage == 0, f"DeepSpeed's ZeRO-0 computes a wrong clip norm over spread experts; {remedy}"),
        (stage == 3, f"DeepSpeed's ZeRO-3 cannot partition experts that differ between ranks; {remedy}"),
        (
            zero.get("reduce_scatter") is False or (stage == 2 and zero.get("contiguous_gradients") is False),
            "DeepSpeed reduces experts' gradients only with reduce_scatter and contiguous_gradients; set both to true",
        ),
        (
            zero.get("overlap_comm") is True,
            "overlap_comm reduces gradients while experts' rows are in flight, in an order that ranks may not "
            "share, and may hang; set it to false",
        ),
        (
            config.parallel.space_ep > 1 and config.model.space_backend == "literal",
            "model.space_backend = 'literal' runs on whole samples; use auto, grouped or wide",
        ),
    ]


def _check_graphs(config: Config, tree: dict[str, Any], accumulation: int) -> None:
    """UserError for what cannot be captured, or would be wrong: ZeRO-1 adds up bfloat16 gradients elsewhere."""
    m, stage = config.model, zero_stage(tree)
    # As `model.experts.fits_grouped_mm` has it; elsewhere the host reads how many rows each expert has, which no graph can.
    grouped = config.train.dtype == "bfloat16" and all(width % 8 == 0 for width in (*m.channels, *m.expert_width))
    refused = {
        "goes with ZeRO-1 and 2": stage not in (1, 2),
        "goes without overlap_comm and offload_optimizer (ds_configs/zero2.json)": not collects(tree),
        "goes with ZeRO-2 where a step has several micro-steps": stage == 1 and accumulation > 1,
        "goes with experts that every rank has (parallel.space_ep=1 parallel.time_ep=1)": config.parallel.spreads,
        "goes without adapters and controls": bool(beside(config)),
        "goes without recipe.gradient_noise": config.recipe.gradient_noise > 0,
        "goes without train.check_gradients": config.train.check_gradients,
        "goes with train.dtype=bfloat16 and widths that are multiples of 8": m.time_experts > 0 and not grouped,
        "goes with model.space_backend=auto or wide": m.space_experts > 0 and m.space_backend not in ("auto", "wide"),
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise no_graphs(reasons[0])


def no_graphs(reason: str) -> UserError:
    """Return the error of `train.cuda_graphs` where it cannot be."""
    return UserError(f"train.cuda_graphs: given true, which {reason}; set train.cuda_graphs=false")


def _section(merged: dict[str, Any], *names: str) -> dict[str, Any]:
    node = merged
    for name in names:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"{name} in the DeepSpeed JSON must be an object, given {node!r}")
    return node


def _set_owned(merged: dict[str, Any], dotted: str, value: Any, owner: str) -> None:
    *sections, key = dotted.split(".")
    node = _section(merged, *sections)
    given = node.get(key, "auto")
    if given != "auto" and given != value:
        _contradiction(dotted, given, owner, value)
    node[key] = value


def _contradiction(key: str, given: Any, owner: str, value: Any) -> None:
    raise UserError(
        f"{key} is {given!r} in the DeepSpeed JSON but {owner} gives {value!r}; remove it from the JSON or make them agree"
    )
