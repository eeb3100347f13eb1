"""A step processes exactly the global batch, on any number of ranks."""

import math
import subprocess
import sys

import pytest

from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.lib.launch import ROOT
from tests.lib.synthetic import tiny_config

WORLDS = [1, 7, 8, 48, 64, 96, 128, 256, 512, 1000]
SHAPES = [(2000, w, m) for w in WORLDS for m in (1, 2, 3, 8)]
SHAPES += [(1, 1, 1), (1, 1, 8), (7, 2, 3), (13, 2, 3), (12, 2, 3), (12, 4, 3), (5, 5, 2), (2048, 1024, 2), (2000, 1024, 2)]
SHAPES = pytest.mark.parametrize(("global_batch_size", "world_size", "micro_batch_size"), SHAPES)


def all_slots(plan: BatchPlan, seen: int) -> list[tuple[int, float]]:
    return [s for m in range(plan.accumulation) for r in range(plan.world_size) for s in plan.slots(seen, r, m)]


@SHAPES
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_sees_each_position_of_its_global_batch_exactly_once(global_batch_size, world_size, micro_batch_size, step):
    plan = BatchPlan(global_batch_size, world_size, micro_batch_size)
    slots = all_slots(plan, step * global_batch_size)
    expected = list(range(step * global_batch_size, (step + 1) * global_batch_size))
    assert sorted(position for position, weight in slots if weight) == expected
    assert sum(weight for _, weight in slots) == global_batch_size
    assert {weight for _, weight in slots} <= {0.0, 1.0}
    assert {position for position, _ in slots} == set(expected)  # an empty slot repeats a sample of this step
    assert len(slots) == world_size * micro_batch_size * plan.accumulation
    assert plan.waste == pytest.approx(1 - global_batch_size / len(slots))
    assert len(slots) - global_batch_size < world_size * micro_batch_size  # no micro-step too many


@SHAPES
def test_deepspeeds_mean_of_scaled_sums_is_the_mean_over_the_global_batch(global_batch_size, world_size, micro_batch_size):
    plan = BatchPlan(global_batch_size, world_size, micro_batch_size)
    # DeepSpeed divides each backward by the accumulation and the all-reduced sum by the world size.
    mean = 0.0
    for micro_step in range(plan.accumulation):
        for rank in range(world_size):
            loss = sum(weight * (position % 11) for position, weight in plan.slots(0, rank, micro_step))
            mean += loss * plan.loss_scale / plan.accumulation / world_size
    assert mean == pytest.approx(sum(p % 11 for p in range(global_batch_size)) / global_batch_size, rel=1e-12)


def test_seven_samples_on_two_ranks_by_hand():
    plan = BatchPlan(global_batch_size=7, world_size=2, micro_batch_size=3)
    assert (plan.accumulation, plan.loss_scale) == (2, 2 * 2 / 7)
    slots = {(m, r): plan.slots(70, r, m) for m in range(2) for r in range(2)}
    assert slots[0, 0] == [(70, 1), (71, 1), (72, 1)]
    assert slots[0, 1] == [(73, 1), (74, 1), (75, 1)]
    assert slots[1, 0] == [(76, 1), (76, 0), (76, 0)]
    assert slots[1, 1] == [(76, 0)] * 3


@pytest.mark.parametrize(("global_batch_size", "world_size"), [(1000, 1024), (2000, 2048), (1, 2)])
def test_more_ranks_than_samples_is_refused_with_both_numbers(global_batch_size, world_size):
    with pytest.raises(
        UserError, match=rf"={global_batch_size} must be at least the number of ranks \({world_size}\)"
    ) as caught:
        BatchPlan(global_batch_size, world_size, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("global_batch_size", "world_size", "micro_batch_size", "better"),
    [(2000, 1000, 8, 2), (2000, 8, 8, 5), (2000, 7, 1, 1), (12, 2, 8, 6), (2000, 1000, 2, 2)],
)
def test_the_better_micro_batch_wastes_least_and_is_the_largest_of_those(
    global_batch_size, world_size, micro_batch_size, better
):
    plan = BatchPlan(global_batch_size, world_size, micro_batch_size)
    assert plan.better_micro_batch() == better
    assert BatchPlan(global_batch_size, world_size, better).waste <= plan.waste


# ---- ranks that share experts, several image sizes -------------------------------------------------------------------

EPS = [(1, 1), (2, 2), (2, 4), (3, 2), (6, 4)]
SIZES = [
    (2000, world, micro, math.lcm(*ep), run)
    for world in (1, 7, 8, 48, 64, 96, 128, 256, 512, 1000, 1024)
    for ep in EPS
    for micro in (1, 2)
    for run in (0, 24, 48)
    if world % ep[0] == 0 and world % ep[1] == 0
]
SIZES += [
    (50, 4, 3, 2, 5),
    (30, 12, 2, 12, 7),
    (50, 4, 3, 2, 6),
    (13, 6, 2, 6, 12),
    (13, 6, 1, 2, 4),
    (7, 2, 3, 1, 3),
    (30, 4, 2, 4, 40),
]


@pytest.mark.parametrize(("global_batch_size", "world_size", "micro_batch_size", "unit", "run"), SIZES)
def test_units_process_one_image_size_and_each_sample_once(global_batch_size, world_size, micro_batch_size, unit, run):
    plan = BatchPlan(global_batch_size, world_size, micro_batch_size, unit, run)
    for seen in [step * global_batch_size for step in (0, 1, 2, 5)]:
        actual = []
        for micro_step in range(plan.accumulation):
            by_rank = [plan.slots(seen, rank, micro_step) for rank in range(world_size)]
            assert all(len(slots) == micro_batch_size for slots in by_rank)
            actual += [position for slots in by_rank for position, weight in slots if weight]
            for first in range(0, world_size, unit):
                together = [position for slots in by_rank[first : first + unit] for position, _ in slots]
                assert not run or len({position // run for position in together}) == 1
                assert all(seen <= position < seen + global_batch_size for position in together)
                assert max(together) - min(together) < unit * micro_batch_size
        assert actual == list(range(seen, seen + global_batch_size))


@pytest.mark.parametrize(("global_batch_size", "world_size", "micro_batch_size", "unit", "run"), SIZES)
def test_the_waste_is_bounded(global_batch_size, world_size, micro_batch_size, unit, run):
    """At most the slots of one micro-step, with several image sizes one chunk at each end of the batch and its runs."""
    plan = BatchPlan(global_batch_size, world_size, micro_batch_size, unit, run)
    slots, span = plan.accumulation * world_size * micro_batch_size, unit * micro_batch_size
    chunks = math.ceil(global_batch_size / span)
    if run:  # a run that is no multiple of a unit's slots ends within some
        chunks = global_batch_size // run * math.ceil(run / span) + math.ceil(global_batch_size % run / span) + 2
    assert global_batch_size <= slots <= math.ceil(chunks / (world_size // unit)) * world_size * micro_batch_size


def test_a_batch_over_two_image_sizes_on_four_ranks_by_hand():
    """Runs of 8 positions, two units of two ranks with 2 samples each; step 1 begins at 10, within the run 8..15."""
    plan = BatchPlan(global_batch_size=10, world_size=4, micro_batch_size=2, unit=2, run=8)
    assert plan.accumulation == 2
    # step 0: 0-3, 4-7, 8-9; step 1: 10-13, 14-15, 16-19
    first = [[p for p, w in plan.slots(0, rank, micro) if w] for micro in range(2) for rank in range(4)]
    assert first == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [], [], []]
    second = [[p for p, w in plan.slots(10, rank, micro) if w] for micro in range(2) for rank in range(4)]
    assert second == [[10, 11], [12, 13], [14, 15], [], [16, 17], [18, 19], [], []]
    assert plan.slots(0, 2, 1) == [(8, 0.0), (9, 0.0)]  # no chunk is left: of the last chunk, without weight


@pytest.mark.parametrize(("run", "before", "batch"), [(24, 7, 20), (6, 11, 4), (5, 3, 13)])
def test_each_sample_is_seen_once_after_a_change_of_global_batch(run, before, batch):
    """A run can continue with another global batch, so a step can start anywhere within a run of one size."""
    config = tiny_config(
        train={"global_batch_size": batch, "micro_batch_size": 3},
        image={"buckets": [[8, 8], [8, 16]]},
        data={"bucket_run": run},
        parallel={"space_ep": 2},
    )
    for stopped_at in range(1, 6):
        seen = stopped_at * before
        plan = BatchPlan.of(config, 4, [seen])
        for step in range(4):
            first = seen + step * batch
            slots = all_slots(plan, first)
            assert [p for p, weight in slots if weight] == list(range(first, first + batch))
    assert BatchPlan.of(config, 4, [3 * batch]) == BatchPlan.of(config, 4)


def test_plan_of_a_configuration_has_the_unit_of_its_experts():
    config = tiny_config(
        parallel={"space_ep": 3, "time_ep": 2}, image={"buckets": [[8, 8], [8, 16]]}, data={"bucket_run": 36}
    )
    plan = BatchPlan.of(config, 6)
    assert (plan.unit, plan.run, plan.global_batch_size, plan.micro_batch_size) == (6, 36, 12, 3)
    assert BatchPlan.of(tiny_config(data={"bucket_run": 36}), 6).run == 0


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (BatchPlan(2000, 600, 2), "better: 500 ranks (0.0%), as many micro-steps as now"),
        (BatchPlan(2000, 1000, 8), "better: train.micro_batch_size=2 (0.0%) or 250 ranks (0.0%)"),
        (BatchPlan(2000, 1200, 1, 12, 24), "better: 1008 ranks (0.8%)"),
        (BatchPlan(2000, 48, 8, 1, 25), "data.bucket_run=32 in a new run"),
    ],
)
def test_plan_with_ten_percent_waste_advises_better_numbers(plan, expected):
    advice = plan.advice()
    assert plan.waste > 0.1
    assert f"{plan.waste:.1%}" in advice[0]
    assert expected in advice[0], advice
    assert BatchPlan(2000, 1000, 2).advice() == []


def test_the_table_in_the_docs_is_what_the_plan_gives():
    done = subprocess.run([sys.executable, "tools/batch_plan.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "docs" / "batching.md").read_text()
