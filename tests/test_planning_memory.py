"""The planner's memory against a real engine's tensors, byte for byte, and activations against what is really alive."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from raphael_dist.config import config_from_tree
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.calibrate import REFERENCE, measured_peak
from raphael_dist.planning.memory import LIBRARIES, held, memory, shapes_of, states, topology
from raphael_dist.planning.spread import stand_in
from raphael_dist.planning.trace import profile, trace
from tests.launch import run_ranks, train_steps
from tests.synthetic import SIZE, TOKENS, TREE, tiny_config


def spec(world: int, stage: int, dtype: str, accumulation: int, space_ep: int, time_ep: int) -> dict[str, Any]:
    train = {"dtype": dtype, "micro_batch": 3, "global_batch": 3 * accumulation * world}
    parallel = {"space_ep": space_ep, "time_ep": time_ep, "placement": ["shard"]}
    return {"stage": stage, "sections": {"train": train, "parallel": parallel}}


def allowed(world: int, stages: tuple[int, ...], sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    found = []
    for stage in stages:
        for dtype in ("float32", "bfloat16") if stage else ("float32",):
            for accumulation in (1, 2):
                for ep in sizes if stage in (1, 2) else ((1, 1),):
                    found.append(spec(world, stage, dtype, accumulation, *ep))
    return found


SMALL_BUCKET = 10_000  # numbers: the gradients of ZeRO-2 do not fit, and DeepSpeed reduces them

# By default each way DeepSpeed keeps its states, with spread experts where they go; all combinations in the slow test.
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
        for one, kinds in zip(specs, measured, strict=True):
            config = tiny_config(**one["sections"])
            accumulation = BatchPlan.of(config, world).accumulation
            where = topology(config, one["stage"], world)
            planned = states(config, shapes_of(config), where, accumulation, rank, collected="bucket" not in one)
            assert asdict(planned) == kinds, (rank, one)


def test_states_are_those_of_a_real_engine_byte_for_byte(tmp_path):
    compare(tmp_path, 2, SOME)


@pytest.mark.slow
def test_states_of_all_stages_precisions_and_expert_parallel_sizes(tmp_path):
    compare(tmp_path, 2, allowed(2, (0, 1, 2, 3), ((1, 1), (2, 1), (2, 2))))


@pytest.mark.parametrize("recompute", ["none", pytest.param("blocks", marks=pytest.mark.slow), "all"])
def test_activations_are_those_that_are_alive_in_a_real_pass(recompute):
    config = config_from_tree(REFERENCE)
    config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint_activations": recompute})})
    measured, planned = measured_peak(config), profile(config).at(config.train.micro_batch, recompute).peak
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("recompute", ["blocks", pytest.param("all", marks=pytest.mark.slow)])
def test_what_recomputation_does_is_what_a_trace_of_it_does(recompute):
    config = config_from_tree(REFERENCE)
    reckoned, traced = profile(config).at(6, recompute), trace(config, 6, recompute)
    assert reckoned.total(reckoned.flops, "forward") == traced.total(traced.flops, "forward")
    assert reckoned.total(reckoned.flops) == pytest.approx(traced.total(traced.flops), rel=0.05)
    assert reckoned.total(reckoned.bytes) == pytest.approx(traced.total(traced.bytes), rel=0.05)
    assert reckoned.peak == pytest.approx(traced.peak, rel=0.05)
    assert reckoned.saved == pytest.approx(traced.saved, rel=0.05)


def test_the_fullest_moment_is_the_backward_pass_or_the_update():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch": 3, "global_batch": 3})
    shapes, where = shapes_of(config), topology(config, 2, 1)
    one = held(config, shapes, where, 1)
    few = memory(config, one, activations=1000, allocator=False)
    assert few.total == one.states.total + one.states.master + LIBRARIES  # gradients in float32
    many = memory(config, one, activations=10**9, allocator=False)
    assert many.total == one.states.total + 10**9 + LIBRARIES
    assert sum(many.by_kind().values()) == many.total


def test_gradients_that_deepspeed_reduces_take_buckets_and_are_joined_for_the_update():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch": 3, "global_batch": 3})
    one = held(config, shapes_of(config), topology(config, 2, 1), 1, overlap=True)
    part = one.states.master // 4
    few, many = (memory(config, one, activations, allocator=False) for activations in (0, 10**12))
    buckets = 2 * (2 * 500_000_000 + one.numbers)
    assert one.update == part * 6
    assert few.total == one.states.total + max(buckets, part * 6) + LIBRARIES
    assert many.total == one.states.total + 10**12 + buckets + LIBRARIES


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "blocks"])
def test_bytes_to_other_ranks_experts_are_those_that_a_real_rank_counts(tmp_path, recompute):
    sections = {
        "model": {**TREE["model"], "checkpoint_activations": recompute},
        "image": {"buckets": [[SIZE, SIZE]]},
        "text": {"max_tokens": TOKENS},
        "train": {"micro_batch": 3, "global_batch": 6},
        "parallel": {"space_ep": 2, "placement": ["shard"], "dispatch": "all_gather"},
    }
    sent = train_steps(tmp_path, 2, sections=sections, deepspeed={"zero_optimization": {"stage": 1}}, steps=1)["sent"]
    config = tiny_config(**sections)
    planned = trace(config, 3, recompute, stand_in(config, BatchPlan.of(config, 2)))
    assert sent == [planned.sent, planned.sent]
