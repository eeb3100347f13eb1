"""The supported keys of a DeepSpeed JSON and their allowed values. All other keys and values raise UserError.

Every supported key is tested against training in a single process. DeepSpeed has more keys, but it ignores some, fails with
an AssertionError for others, and some change internals that `engine.zero` relies on, so that training would continue with
wrong numbers.
"""

import json
import math
from typing import Any

from raphael_dist.errors import UserError, did_you_mean

Tree = dict[str, Any]  # a DeepSpeed configuration
Value = str | tuple[str | int | bool, ...]  # a kind of values, or all values that are allowed
FLAG, NUMBER, TEXT, TEXTS = "true or false", "a number", "a string", "a list of strings"
WHOLE, COUNT = "a whole number, 0 or more", "a whole number, 1 or more"
OFF, ON = (False,), (True,)

_OFFLOAD: dict[str, Value] = {"device": ("none", "cpu"), "pin_memory": FLAG, "buffer_count": COUNT}
_ZERO: dict[str, Value] = {
    "stage": (0, 1, 2, 3),
    "overlap_comm": FLAG, "reduce_bucket_size": COUNT, "allgather_bucket_size": COUNT, "sub_group_size": COUNT,
    "stage3_prefetch_bucket_size": WHOLE, "stage3_param_persistence_threshold": WHOLE,
    "stage3_model_persistence_threshold": WHOLE, "stage3_max_live_parameters": WHOLE, "stage3_max_reuse_distance": WHOLE,
    **{f"offload_optimizer.{key}": kind for key, kind in _OFFLOAD.items()},
    **{f"offload_param.{key}": kind for key, kind in _OFFLOAD.items()},
    "offload_param.buffer_size": COUNT, "offload_param.max_in_cpu": WHOLE, "offload_optimizer.ratio": (1,),
    **dict.fromkeys((
        "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
        "compute_grad_norm", "ignore_unused_parameters", "parameter_alignment", "memory_efficient_linear",
        "override_module_apply", "load_from_fp32_weights",
    ), ON),
    **dict.fromkeys((
        "round_robin_gradients", "legacy_stage1", "elastic_checkpoint", "zero_quantized_weights",
        "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "stage3_gather_16bit_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "enable_sanity_checks",
        "offload_optimizer.pipeline_read", "offload_optimizer.pipeline_write", "offload_optimizer.fast_init",
        "offload_optimizer.super_offload",
    ), OFF),
    "stage3_module_granularity_threshold": (0,), "zero_hpz_partition_size": (1,),
}  # fmt: skip

SUPPORTED: dict[str, Value] = {
    "train_batch_size": COUNT, "train_micro_batch_size_per_gpu": COUNT, "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NUMBER,
    **{f"zero_optimization.{key}": kind for key, kind in _ZERO.items()},
    "bf16.enabled": FLAG, "bf16.immediate_grad_update": OFF, "bf16.check_grad_overflow": ON,
    "bf16.bf16_master_weights_and_grads": OFF, "bf16.bf16_optimizer_states": OFF,
    # Without effect, because fp16 is never enabled. Templates for other trainers have them with these values.
    "fp16.enabled": FLAG, "fp16.auto_cast": OFF, "fp16.loss_scale": (0,), "fp16.loss_scale_window": (1000,),
    "fp16.initial_scale_power": (16,), "fp16.hysteresis": (2,), "fp16.min_loss_scale": (1,),
    "fp16.consecutive_hysteresis": OFF,
    "data_types.grad_accum_dtype": ("fp32",), "communication_data_type": ("fp32",),
    "prescale_gradients": OFF, "gradient_predivide_factor": (1,), "gradient_allreduce_op": ("mean",),
    "zero_allow_untested_optimizer": ON, "zero_force_ds_cpu_optimizer": OFF,
    "steps_per_print": COUNT, "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "timers.throughput.enabled": FLAG, "timers.throughput.synchronized": FLAG,
    "comms_logger.enabled": FLAG, "comms_logger.prof_all": FLAG, "comms_logger.prof_ops": TEXTS,
    "comms_logger.verbose": FLAG, "comms_logger.debug": FLAG,
    "flops_profiler.enabled": FLAG, "flops_profiler.profile_step": COUNT, "flops_profiler.module_depth": NUMBER,
    "flops_profiler.top_modules": COUNT, "flops_profiler.detailed": FLAG, "flops_profiler.output_file": TEXT,
    "flops_profiler.recompute_fwd_factor": NUMBER,
}  # fmt: skip

_TRACKERS = "use run.trackers; TensorBoard's files are in run.dir/tensorboard"
_NOT_USED = {
    "optimizer": "use optim.* of the configuration",
    "scheduler": "use optim.warmup_steps and optim.lr_schedule",
    "elasticity": "train.global_batch_size is kept for any number of ranks",
    "checkpoint": "checkpoints are written by raphael_dist; use checkpoint.*",
    "amp": "use train.dtype",
    "torch_autocast": "use train.dtype",
    "data_efficiency": "the data order is a function of run.seed",
    "curriculum_learning": "the data order is a function of run.seed",
    "sparse_gradients": "DeepSpeed has removed it, and the model has no sparse gradients",
    "activation_checkpointing": "use model.checkpoint_activations",
    "compile": "use train.compile",
    "aio": "it is for NVMe offload, but the fp32 weights must stay in memory",
    "zero_optimization.cpu_offload": 'use "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'use "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'use "pin_memory" in offload_optimizer or offload_param',
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _TRACKERS),
}
_BECAUSE = {
    "zero_optimization.round_robin_gradients": "DeepSpeed moves parameters in its flat buffers and does not record where",
    "zero_optimization.parameter_alignment": "the grouped product on GPUs reads parameters at multiples of 16 bytes",
    "zero_optimization.offload_optimizer.device": "the EMA and checkpoints require the fp32 weights in memory",
    "zero_optimization.offload_param.device": "the EMA and checkpoints require the fp32 weights in memory",
    "zero_optimization.contiguous_gradients": "the gradients of sharded experts require it",
    "zero_optimization.reduce_scatter": "the gradients of sharded experts require it",
    "prescale_gradients": "the loss is scaled so that DeepSpeed's mean is the mean over the global batch",
    "gradient_predivide_factor": "the loss is scaled so that DeepSpeed's mean is the mean over the global batch",
    "gradient_allreduce_op": "the loss is scaled so that DeepSpeed's mean is the mean over the global batch",
}


def without_unset(tree: Tree) -> Tree:
    """Return a copy of a DeepSpeed JSON without comments (keys that start with _) and without keys set to "auto" or null."""
    plain = {key: without_unset(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in plain.items() if not key.startswith("_") and value not in ("auto", None)}


def check_keys(tree: Tree, section: str = "") -> None:
    """Raise UserError for the first key or value of a DeepSpeed JSON that is not supported.

    Args:
        tree: the JSON as a dict, or one of its sections.
        section: dotted name of that section with a final dot, e.g. "zero_optimization."; "": the whole file.
    """
    for key, value in tree.items():
        name = section + key
        if name in _NOT_USED:
            raise UserError(f"{name} in the DeepSpeed JSON is not used: {_NOT_USED[name]}. Remove it from the JSON.")
        if name in SUPPORTED:
            _check_value(name, value)
        elif any(known.startswith(f"{name}.") for known in SUPPORTED):
            if not isinstance(value, dict):
                raise UserError(
                    f"{name}={json.dumps(value)} in the DeepSpeed JSON must be a JSON object. Write it as "
                    f'"{key}": {{"KEY": VALUE, ...}}, or remove it.'
                )
            check_keys(value, f"{name}.")
        else:
            siblings = sorted({k.removeprefix(section).split(".")[0] for k in SUPPORTED if k.startswith(section)})
            where = f" in {section[:-1]}" if section else ""
            raise UserError(
                f"{name} in the DeepSpeed JSON is not supported{did_you_mean(key, siblings)}. Remove it. Supported "
                f"keys{where} are {', '.join(siblings)}."
            )


def _check_value(name: str, value: object) -> None:
    supported = SUPPORTED[name]
    if _is_supported(value, supported):
        return
    allowed = supported if isinstance(supported, str) else " or ".join(json.dumps(choice) for choice in supported)
    because = f", because {_BECAUSE[name]}" if name in _BECAUSE else ""
    raise UserError(
        f"{name}={json.dumps(value)} in the DeepSpeed JSON must be {allowed}{because}. Set an allowed value, or remove it "
        "to use the default."
    )


def _is_supported(value: object, supported: Value) -> bool:
    if isinstance(supported, tuple):
        # 1.0 is accepted for 1. In Python True == 1, but true is not accepted for 1.
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in supported)
    if supported == FLAG:
        return isinstance(value, bool)
    if supported == TEXT:
        return isinstance(value, str)
    if supported == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return supported == NUMBER or (value >= (1 if supported == COUNT else 0) and value == int(value))
