"""Every key of a DeepSpeed JSON is tested against a single process, or refused by name in one line."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from raphael_dist.config.schema import Config
from raphael_dist.engine import ds_config
from raphael_dist.engine.ds_keys import SUPPORTED
from raphael_dist.errors import UserError
from tests.engine.test_zero_parity import STEPS, one_process, same_steps
from tests.lib.launch import train_many

SMALL = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 20_000}
CPU = {"device": "cpu", "pin_memory": False, "buffer_count": 3}
STAGE_3 = {
    f"stage3_{key}": 2_000
    for key in ("prefetch_bucket_size", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance")
} | {"stage3_param_persistence_threshold": 100}
LOGS = {
    "steps_per_print": 1, "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True,
    "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"], "verbose": True, "debug": True},
    "flops_profiler": {"enabled": True, "profile_step": 2, "module_depth": -1, "top_modules": 2, "detailed": False,
                       "output_file": "flops.txt", "recompute_fwd_factor": 0.5},
}  # fmt: skip
TREES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1, "overlap_comm": True, **SMALL}},
    "zero2": {"zero_optimization": {"stage": 2, "overlap_comm": True, **SMALL}},
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU, **SMALL}},
    "zero3": {"zero_optimization": {"stage": 3, "sub_group_size": 3_000, "overlap_comm": True, **STAGE_3, **SMALL}},
    "zero3 offload": {
        "zero_optimization": {
            "stage": 3, "offload_optimizer": CPU, "sub_group_size": 3_000, **STAGE_3,
            "offload_param": {**CPU, "buffer_size": 50_000, "max_in_cpu": 1_000},
        }
    },
    "logs": {"zero_optimization": {"stage": 2}, **LOGS},
    "logs of zero3": {"zero_optimization": {"stage": 3}, **LOGS},
}  # fmt: skip
OWNED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
         "bf16.enabled", "fp16.enabled"}  # fmt: skip


def leaves(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    actual: dict[str, Any] = {}
    for key, value in tree.items():
        actual |= leaves(value, f"{section}{key}.") if isinstance(value, dict) else {section + key: value}
    return actual


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    sections = {"train": {"global_batch_size": 13}, "optim": {"kind": "sgd", "max_grad_norm": 0.5}}
    folder = tmp_path_factory.mktemp("keys")
    arguments = json.loads(json.dumps(TREES).replace("flops.txt", str(folder / "flops.txt")))
    specs = [{"sections": sections, "deepspeed": tree, "steps": STEPS} for tree in arguments.values()]
    return dict(zip(TREES, train_many(folder, 2, specs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_json_settings_do_not_change_the_steps(name: str, runs: dict[str, dict[str, Any]]) -> None:
    same_steps(runs[name], one_process(13, 0.5))


def test_every_supported_value_is_tested_or_is_the_default() -> None:
    tried: dict[str, list[Any]] = {}
    for tree in TREES.values():
        for name, value in leaves(tree).items():
            tried.setdefault(name, []).append(value)
    defaults = deepspeeds_defaults()
    for name, kind in SUPPORTED.items():
        if name in OWNED:
            continue
        values = kind if isinstance(kind, tuple) else ()
        untried = [value for value in values if value not in tried.get(name, []) and not _is_default(name, value, defaults)]
        # Ours, where DeepSpeed's default is another: they are set in every run.
        always = {"zero_optimization.parameter_alignment", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
        assert not untried or name in always, f"{name}: {untried}"
        assert values or name in tried, name


def _is_default(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    # Stages without keys are tests/engine/test_zero_parity.py's.
    return name == "zero_optimization.stage" or (name in defaults and defaults[name] == value)


MODELS = {
    "zero_optimization": "runtime.zero.config.DeepSpeedZeroConfig",
    "zero_optimization.offload_optimizer": "runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.offload_param": "runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    "bf16": "runtime.precision_config.DeepSpeedBF16Config",
    "fp16": "runtime.precision_config.DeepSpeedFP16Config",
    "comms_logger": "comm.config.CommsLoggerConfig",
    "timers.throughput": "utils.config.DeepSpeedThroughputTimerConfig",
}


def deepspeeds_defaults() -> dict[str, Any]:
    """Return the keys of DeepSpeed's sections with their defaults, and the top-level keys from its constants."""
    constants = vars(importlib.import_module("deepspeed.runtime.constants"))
    actual = {
        value: constants.get(f"{name}_DEFAULT")
        for name, value in constants.items()
        if isinstance(value, str) and value.isidentifier() and value == value.lower() and not name.endswith("_DEFAULT")
    }
    for section, path in MODELS.items():
        module, _, name = path.rpartition(".")
        fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
        actual |= {f"{section}.{field.alias or key}": field.default for key, field in fields.items()}
    return actual


def test_every_other_key_that_deepspeed_knows_is_refused_by_name() -> None:
    known = deepspeeds_defaults()
    assert len(known) > 100
    missing = [
        name for name in SUPPORTED if name not in known and name.split(".")[0] not in ("data_types", "flops_profiler")
    ]
    assert not missing, "DeepSpeed has no such key"
    sections = {name.rpartition(".")[0] for name in SUPPORTED} | {"timers"}
    for name in sorted(set(known) - set(SUPPORTED) - sections):
        message = refusal(nested(name, True))
        assert message.startswith(f"{name} in the DeepSpeed JSON is "), message


def nested(name: str, value: Any) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    return {first: nested(rest, value) if rest else value}


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        ds_config.merge(Config(), tree, 2, 2)
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG: list[tuple[str, Any, str]] = [
    ("zero_optimization.round_robin_gradients", True, "=true in the DeepSpeed JSON must be false, because DeepSpeed moves"),
    ("zero_optimization.parameter_alignment", False, "=false in the DeepSpeed JSON must be true, because the grouped"),
    ("zero_optimization.reduce_scatter", False, "must be true"),
    ("zero_optimization.contiguous_gradients", False, "must be true"),
    ("zero_optimization.zero_quantized_gradients", True, "must be false"),
    ("zero_optimization.zero_hpz_partition_size", 8, "=8 in the DeepSpeed JSON must be 1"),
    ("zero_optimization.cpu_offload", True, 'use "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.offload_optimizer.nvme_path", "/x", "is not supported"),
    ("zero_optimization.offload_optimizer.ratio", 0.5, "=0.5 in the DeepSpeed JSON must be 1"),
    ("zero_optimization.reduce_bucket_sise", 1, "did you mean 'reduce_bucket_size'"),
    ("zero_optimization.reduce_bucket_size", True, "=true in the DeepSpeed JSON must be a whole number, 1 or more"),
    ("steps_per_print", 0, "=0 in the DeepSpeed JSON must be a whole number, 1 or more"),
    ("zero_optimization.reduce_bucket_size", 0.5, "must be a whole number"),
    ("zero_optimization.overlap_comm", 1, "=1 in the DeepSpeed JSON must be true or false"),
    ("zero_optimization", True, "=true in the DeepSpeed JSON must be a JSON object"),
    ("sparse_gradients", False, "is not used: DeepSpeed has removed it"),
    ("prescale_gradients", True, "must be false, because the loss is scaled"),
    ("gradient_predivide_factor", 2.0, "=2.0 in the DeepSpeed JSON must be 1, because the loss is scaled"),
    ("gradient_allreduce_op", "sum", 'must be "mean"'),
    ("gradient_clipping", True, "must be a number"),
    ("communication_data_type", "fp16", 'must be "fp32"'),
    ("data_types.grad_accum_dtype", "bf16", 'must be "fp32"'),
    ("bf16.bf16_master_weights_and_grads", True, "must be false"),
    ("fp16.auto_cast", True, "must be false"),
    ("flops_profiler.enabled", "yes", 'must be true or false'),
    ("tensorboard.enabled", True, "tensorboard in the DeepSpeed JSON is not used: use run.trackers"),
    ("compile.deepcompile", True, "compile in the DeepSpeed JSON is not used: use train.compile"),
    ("zero_optimisation.stage", 2, "did you mean 'zero_optimization'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_key_or_value_that_is_not_supported_is_refused_in_one_line(name: str, value: Any, message: str) -> None:
    assert message in refusal(nested(name, value))


def test_offload_of_what_a_stage_does_not_shard_is_refused() -> None:
    for name, stage, allowed in (("offload_param", 2, "stage 3"), ("offload_optimizer", 0, "stage 1 or 2 or 3")):
        zero = {"stage": stage, name: {"device": "cpu"}}
        assert f"requires {allowed}, but zero_optimization.stage is {stage}" in refusal({"zero_optimization": zero})


def test_a_template_of_other_trainers_is_accepted() -> None:
    tree = {
        "_comment": "from transformers' documentation",
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
                 "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}, "allgather_partitions": True,
            "allgather_bucket_size": 2e8, "overlap_comm": False, "reduce_scatter": True, "reduce_bucket_size": "auto",
            "contiguous_gradients": True, "offload_param": None, "_why": "a comment",
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 1e5, "wall_clock_breakdown": False,
    }  # fmt: skip
    merged = ds_config.merge(Config(), tree, 2, 2)
    assert merged["zero_optimization"]["reduce_bucket_size"] == ds_config.CONTIGUOUS_BUCKET
    assert not any(value in ("auto", None) or "_why" in name or "_comment" in name for name, value in leaves(merged).items())


def test_repeated_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="'zero_optimization' occurs twice in one object"):
        ds_config.read_deepspeed_json(str(tmp_path / "ds.json"))
