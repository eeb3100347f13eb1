"""DeepSpeed has all names that the adapters of engine/zero.py use. An incompatible DeepSpeed fails here."""

import ast
import importlib
import inspect
import re
import textwrap
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from deepspeed.comm.torch import TorchBackend

from raphael_dist.engine import zero
from raphael_dist.engine.deepspeed_comm import CountedBackend

ROOT = Path(__file__).parents[2]
# Each adapter, DeepSpeed's class behind it, and every name of that class which the adapter reads, replaces or calls.
CONTRACT = {
    "Zero12": (
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
        "single_partition_of_fp32_groups update_lp_params cpu_offload _wait_for_offload_copies averaged_gradients "
        "check_grad_overflow clip_grad scaled_global_norm overflow check_overflow _update_model_bit16_weights",
    ),
    "Zero12Contiguous": (
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
        "_grad_acc_hooks overlapping_partition_gradients_reduce_epilogue reduce_gradients bit16_groups_flat "
        "round_robin_bit16_groups round_robin_bit16_offsets cpu_offload overlap_comm use_grad_accum_attribute "
        "partition_gradients reduce_bucket_size dp_process_group real_dp_process_group "
        "is_gradient_accumulation_boundary communication_data_type gradient_accumulation_dtype averaged_gradients "
        "step optimizer check_grad_overflow overflow parallel_partitioned_bit16_groups single_partition_of_fp32_groups",
    ),
    "Zero1Bf16": (
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
        "fp32_groups_flat_partition update_lp_params fp32_groups_gradient_flat_partition clip_grad get_grads_for_norm",
    ),
    "Zero3": (
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
        "fp32_partitioned_groups_flat fp16_partitioned_groups_flat grad_position get_param_id _partition_all_parameters "
        "persistent_parameters offload_optimizer averaged_gradients clip_grad _get_norm_groups",
    ),
}
# An optimizer's kind is detected by these names, in this order: none may have that of an earlier kind.
TELLING = {
    "Zero3": "fp32_partitioned_groups_flat",
    "Zero1Bf16": "fp32_groups_gradient_flat_partition",
    "Zero12": "single_partition_of_fp32_groups",
}


def names_of(path: str) -> set[str]:
    """Return the methods and attributes of a class and of its bases in DeepSpeed."""
    module, _, name = path.rpartition(".")
    classes = getattr(importlib.import_module(module), name).__mro__
    actual = set()
    for item in (item for item in classes if item.__module__.startswith("deepspeed.")):
        nodes = list(ast.walk(ast.parse(inspect.getsource(item))))
        actual |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
        actual |= {node.attr for node in stored if ast.unparse(node.value) == "self"}
    return actual


def used_by(adapter: str) -> set[str]:
    """Return the attributes of `self._zero` (or `zero`) that an adapter uses."""
    source = inspect.getsource(getattr(zero, adapter))
    actual = set(re.findall(r"(?<![\w.])(?:self\._zero|zero)\.(\w+)", source))
    return actual | set(re.findall(r"replaced\((?:self\._zero|zero), \"(\w+)\"", source))


@pytest.mark.parametrize("adapter", CONTRACT)
def test_names_used_by_an_adapter_exist_in_deepspeed(adapter):
    path, names = CONTRACT[adapter]
    assert used_by(adapter) == set(names.split()), "the contract must name what the adapter uses"
    missing = set(names.split()) - names_of(path)
    assert not missing, f"DeepSpeed {version('deepspeed')} has no {path}.{sorted(missing)}: see engine/zero.py {adapter}"


def test_each_kind_is_detected_by_a_name_that_later_kinds_lack():
    for i, (kind, name) in enumerate(TELLING.items()):
        assert name in names_of(CONTRACT[kind][0])
        for other in list(TELLING)[i + 1 :]:
            assert name not in names_of(CONTRACT[other][0]), f"{other} would be taken for {kind}"


def test_only_the_engine_uses_deepspeeds_private_names():
    """Only attributes count. convert/layouts/deepspeed uses the same names as strings, for keys of DeepSpeed's files."""
    private = {name for _, names in CONTRACT.values() for name in names.split()} - {"overflow", "step", "optimizer"}
    private |= {"_hp_mapping", "ds_shape", "ds_numel", "ds_process_group", "__compatible_ops__", "optimizer_state_dict"}
    outside = [path for path in (ROOT / "raphael_dist").rglob("*.py") if "engine" not in path.parts]
    nodes = {path: ast.walk(ast.parse(path.read_text())) for path in outside}
    reached = [(p.name, n.attr) for p in outside for n in nodes[p] if isinstance(n, ast.Attribute) and n.attr in private]
    assert len(outside) > 50
    assert not reached


def test_deepspeed_is_bound_to_the_minor_version_that_the_adapters_know():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound = next(line for line in project["dependencies"] if line.startswith("deepspeed"))
    major, minor = version("deepspeed").split(".")[:2]
    assert bound.endswith(f"<{major}.{int(minor) + 1}"), f"{bound}: raise the bound when this file passes on a newer one"


def arguments(cls: type) -> dict[str, list[str]]:
    """Return the arguments of each method as they are written, without decorators."""
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    return {node.name: [arg.arg for arg in node.args.args] for node in nodes if isinstance(node, ast.FunctionDef)}


def test_counted_collectives_take_the_arguments_of_deepspeeds():
    own, theirs = arguments(CountedBackend), arguments(TorchBackend)
    common = own.keys() & theirs.keys() - {"__init__"}
    assert {"all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"} <= common
    assert {name: own[name] for name in common} == {name: theirs[name] for name in common}
