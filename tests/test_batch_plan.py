"""The global batch is exactly what was asked for, on any number of ranks."""

import pytest

from raphael_dist.batch_plan import BatchPlan
from raphael_dist.errors import UserError

WORLDS = [1, 7, 8, 48, 64, 96, 128, 256, 512, 1000]
SHAPES = [(2000, w, m) for w in WORLDS for m in (1, 2, 3, 8)]
SHAPES += [(1, 1, 1), (1, 1, 8), (7, 2, 3), (13, 2, 3), (12, 2, 3), (12, 4, 3), (5, 5, 2), (2048, 1024, 2), (2000, 1024, 2)]
SHAPES = pytest.mark.parametrize(("global_batch", "world_size", "micro_batch"), SHAPES)


def all_slots(plan: BatchPlan, seen: int) -> list[tuple[int, float]]:
    return [s for m in range(plan.accumulation) for r in range(plan.world_size) for s in plan.slots(seen, r, m)]


@SHAPES
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_sees_each_position_of_its_global_batch_exactly_once(global_batch, world_size, micro_batch, step):
    plan = BatchPlan(global_batch, world_size, micro_batch)
    slots = all_slots(plan, step * global_batch)
    wanted = list(range(step * global_batch, (step + 1) * global_batch))
    assert sorted(position for position, weight in slots if weight) == wanted
    assert sum(weight for _, weight in slots) == global_batch
    assert {weight for _, weight in slots} <= {0.0, 1.0}
    assert {position for position, _ in slots} == set(wanted)  # an empty slot repeats a sample of this step
    assert len(slots) == world_size * micro_batch * plan.accumulation
    assert plan.waste == pytest.approx(1 - global_batch / len(slots))
    assert len(slots) - global_batch < world_size * micro_batch  # no micro-step too many


@SHAPES
def test_deepspeeds_mean_of_scaled_sums_is_the_mean_over_the_global_batch(global_batch, world_size, micro_batch):
    plan = BatchPlan(global_batch, world_size, micro_batch)
    # DeepSpeed divides each backward by the accumulation and the all-reduced sum by the world size.
    mean = 0.0
    for micro_step in range(plan.accumulation):
        for rank in range(world_size):
            loss = sum(weight * (position % 11) for position, weight in plan.slots(0, rank, micro_step))
            mean += loss * plan.loss_scale / plan.accumulation / world_size
    assert mean == pytest.approx(sum(p % 11 for p in range(global_batch)) / global_batch, rel=1e-12)


def test_seven_samples_on_two_ranks_by_hand():
    plan = BatchPlan(global_batch=7, world_size=2, micro_batch=3)
    assert (plan.accumulation, plan.loss_scale) == (2, 2 * 2 / 7)
    slots = {(m, r): plan.slots(70, r, m) for m in range(2) for r in range(2)}
    assert slots[0, 0] == [(70, 1), (71, 1), (72, 1)]
    assert slots[0, 1] == [(73, 1), (74, 1), (75, 1)]
    assert slots[1, 0] == [(76, 1), (76, 0), (76, 0)]
    assert slots[1, 1] == [(76, 0)] * 3


@pytest.mark.parametrize(("global_batch", "world_size"), [(1000, 1024), (2000, 2048), (1, 2)])
def test_more_ranks_than_samples_is_a_users_error_with_both_numbers(global_batch, world_size):
    with pytest.raises(UserError, match=f"global_batch = {global_batch} cannot serve {world_size} ranks") as caught:
        BatchPlan(global_batch, world_size, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "better"),
    [(2000, 1000, 8, 2), (2000, 8, 8, 5), (2000, 7, 1, 1), (12, 2, 8, 6), (2000, 1000, 2, 2)],
)
def test_the_better_micro_batch_wastes_least_and_is_the_largest_of_those(global_batch, world_size, micro_batch, better):
    plan = BatchPlan(global_batch, world_size, micro_batch)
    assert plan.better_micro_batch() == better
    assert BatchPlan(global_batch, world_size, better).waste <= plan.waste
