"""Planned memory equals the tensors of a real engine byte for byte, and planned activations equal live memory."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from raphael_dist.config.schema import config_from_tree
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.engine.ds_config import CONTIGUOUS_BUCKET
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.calibrate import REFERENCE, measured_peak
from raphael_dist.planning.memory import LIBRARIES, memory_footprint, model_states, rank_memory, topology
from raphael_dist.planning.trace import profile, trace
from tests.lib.launch import run_ranks
from tests.lib.synthetic import tiny_config


def spec(world: int, stage: int, dtype: str, accumulation: int, space_ep: int, time_ep: int) -> dict[str, Any]:
    train = {"dtype": dtype, "micro_batch_size": 3, "global_batch_size": 3 * accumulation * world}
    parallel = {"space_ep": space_ep, "time_ep": time_ep, "placement": ["shard"]}
    return {"stage": stage, "sections": {"train": train, "parallel": parallel}}


def allowed(world: int, stages: tuple[int, ...], sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    actual = []
    for stage in stages:
        for dtype in ("float32", "bfloat16") if stage else ("float32",):
            for accumulation in (1, 2):
                for ep in sizes if stage in (1, 2) else ((1, 1),):
                    actual.append(spec(world, stage, dtype, accumulation, *ep))
    return actual


SMALL_BUCKET = 10_000  # numbers: the gradients of ZeRO-2 do not fit, and DeepSpeed reduces them

# By default each way DeepSpeed keeps its states, with sharded experts where they are supported; all combinations in the slow
# test.
SOME = [
    spec(2, 0, "float32", 2, 1, 1),
    spec(2, 1, "float32", 1, 2, 1),
    spec(2, 1, "bfloat16", 2, 2, 2),
    spec(2, 2, "bfloat16", 1, 1, 1),
    spec(2, 2, "bfloat16", 2, 2, 2),
    spec(2, 3, "bfloat16", 2, 1, 1),
    {**spec(2, 2, "bfloat16", 1, 2, 1), "bucket": SMALL_BUCKET},
    {**spec(2, 2, "bfloat16", 2, 1, 1), "bucket": SMALL_BUCKET},
]


def compare(folder: Path, world: int, specs: list[dict[str, Any]]) -> None:
    run_ranks(["tests/workers/plan_states.py", str(folder / "held"), json.dumps(specs)], world)
    for rank in range(world):
        measured = json.loads((folder / f"held.{rank}.json").read_text())
        for item, kinds in zip(specs, measured, strict=True):
            config = tiny_config(**item["sections"])
            accumulation = BatchPlan.of(config, world).accumulation
            where = topology(config, item["stage"], world)
            shapes, contiguous = parameter_shapes(config), "bucket" not in item
            planned = model_states(config, shapes, where, accumulation, rank, contiguous=contiguous)
            assert asdict(planned) == kinds, (rank, item)


def test_states_are_those_of_a_real_engine_byte_for_byte(tmp_path):
    compare(tmp_path, 2, SOME)


@pytest.mark.slow
def test_states_of_all_stages_precisions_and_expert_parallel_sizes(tmp_path):
    compare(tmp_path, 2, allowed(2, (0, 1, 2, 3), ((1, 1), (2, 1), (2, 2))))


@pytest.mark.parametrize("recompute", ["none", pytest.param("blocks", marks=pytest.mark.slow), "all"])
def test_planned_activations_equal_those_of_a_real_pass(recompute):
    config = config_from_tree(REFERENCE)
    config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint_activations": recompute})})
    measured, planned = measured_peak(config), profile(config).at(config.train.micro_batch_size, recompute).peak
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("recompute", ["blocks", pytest.param("all", marks=pytest.mark.slow)])
def test_planned_recomputation_equals_a_trace_of_it(recompute):
    config = config_from_tree(REFERENCE)
    predicted, traced = profile(config).at(6, recompute), trace(config, 6, recompute)
    assert predicted.total(predicted.flops, "forward") == traced.total(traced.flops, "forward")
    assert predicted.total(predicted.flops) == pytest.approx(traced.total(traced.flops), rel=0.05)
    assert predicted.total(predicted.bytes) == pytest.approx(traced.total(traced.bytes), rel=0.05)
    assert predicted.peak == pytest.approx(traced.peak, rel=0.05)
    assert predicted.saved == pytest.approx(traced.saved, rel=0.05)


def test_peak_memory_is_in_the_backward_pass_or_the_update():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 3, "global_batch_size": 3})
    shapes, where = parameter_shapes(config), topology(config, 2, 1)
    item = memory_footprint(config, shapes, where, 1)
    few = rank_memory(config, item, activations=1000, allocator=False)
    assert few.total == item.states.total + item.states.master + LIBRARIES  # gradients in float32
    many = rank_memory(config, item, activations=10**9, allocator=False)
    assert many.total == item.states.total + 10**9 + LIBRARIES
    assert sum(many.by_kind().values()) == many.total


def test_gradients_reduced_by_deepspeed_need_buckets_and_copies(monkeypatch):
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 3, "global_batch_size": 3})
    monkeypatch.setattr("raphael_dist.planning.memory.uses_contiguous_gradients", lambda *_, **__: False)
    item = memory_footprint(config, parameter_shapes(config), topology(config, 2, 1), 1)
    part = item.states.master // 4
    few, many = (rank_memory(config, item, activations, allocator=False) for activations in (0, 10**12))
    buckets = 2 * (CONTIGUOUS_BUCKET + item.elements)
    assert item.update_bytes == part * 6
    assert few.total == item.states.total + max(buckets, part * 6) + LIBRARIES
    assert many.total == item.states.total + 10**12 + buckets + LIBRARIES


def test_overlap_needs_memory_for_the_gathered_weights_only_in_the_update():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 3, "global_batch_size": 6})
    plain, overlapped = (
        memory_footprint(config, parameter_shapes(config), topology(config, 2, 2), 1, overlap) for overlap in (False, True)
    )
    assert overlapped.states == plain.states
    assert overlapped.buffer_elements == plain.buffer_elements == 0
    gathered = plain.states.weights + plain.states.weights // 2  # all weights, and this rank's part once more
    assert overlapped.update_bytes - plain.update_bytes == gathered
