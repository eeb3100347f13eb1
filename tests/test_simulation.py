"""The simulation of a run reproduces what can be worked out by hand, and its seconds add up."""

import math

import numpy as np
import pytest

from raphael_dist.planning.simulate import Survival, Work, simulate, step_durations

CALM = Work(ranks=16, images=32, compute=0.75, communication=0.25)


def test_without_spread_and_failures_it_is_the_closed_form():
    result = simulate(CALM, Survival(save_every=10, stall_s=0.5, write_s=3.0), seconds=105.0)
    # Ten steps of one second and half a second of saving: ten times, in 105 s.
    assert result.steps == 100
    spent = {what: seconds for what, seconds in result.spent.items() if seconds > 1e-9}
    assert spent == pytest.approx({"compute": 75.0, "communication": 25.0, "saves": 5.0})
    assert result.images_per_s == pytest.approx(32 * 100 / 105)


def test_one_failure_loses_exactly_what_was_not_on_disk_and_the_restart():
    # Saved at 10, 20.5, 31 and on disk 3 s later. The failure at 33 s comes before the third is on disk: the run goes on
    # from step 20, captured at 20.5 + 0.5, so that 12 s are lost, and 7 s of restart.
    survival = Survival(save_every=10, stall_s=0.5, write_s=3.0, restart_s=7.0)
    result = simulate(CALM, survival, seconds=1040.0, failures=[33.0])
    whole = simulate(CALM, survival, seconds=1040.0 - 12.0 - 7.0, failures=[])
    assert result.spent["repeated work"] == pytest.approx(12.0)
    assert result.spent["restarts"] == pytest.approx(7.0)
    assert result.steps == whole.steps
    assert result.failures == 1


def test_a_failure_during_a_restart_begins_it_anew():
    result = simulate(CALM, Survival(save_every=10, restart_s=7.0), seconds=100.0, failures=[10.0, 15.0])
    assert result.spent["restarts"] == pytest.approx(12.0)
    assert result.failures == 2


def test_a_save_waits_for_the_one_before():
    result = simulate(CALM, Survival(save_every=2, write_s=5.0), seconds=100.0)
    # Two steps, then three seconds of waiting for the disk, except before the first save is begun.
    assert result.spent["saves"] == pytest.approx(3.0 * 19, abs=3.0)


@pytest.mark.parametrize("seed", range(3))
def test_seconds_add_up_whatever_happens(seed):
    work = Work(64, 64, 0.8, 0.2, spread=0.05, slow=0.1, slower=1.2, data_share=0.01, data_s=2.0, group=4, exchanges=6)
    survival = Survival(save_every=17, stall_s=0.3, write_s=40.0, mtbf_s=500.0, restart_s=60.0)
    result = simulate(work, survival, seconds=20_000.0, seed=seed)
    assert sum(result.spent.values()) == pytest.approx(20_000.0)
    assert result.failures > 10
    assert result.spent["repeated work"] > 0
    assert result.spent["compute"] == pytest.approx(0.8 * result.steps, rel=1e-6)


def test_the_slowest_of_two_ranks_is_expected_as_order_statistics_say():
    # The mean of the larger of two standard normals is 1 / sqrt(pi).
    seconds = step_durations(Work(2, 2, 1.0, spread=0.1))[:, 2]
    assert seconds.mean() == pytest.approx(1 + 0.1 / math.sqrt(math.pi), abs=5 * 0.1 / math.sqrt(len(seconds)))


def test_a_slow_rank_sets_the_pace_and_groups_that_meet_often_lose_more():
    assert step_durations(Work(100, 1, 1.0, slow=0.01, slower=1.5))[:, 1] == pytest.approx(1.5)
    alone = step_durations(Work(64, 1, 1.0, spread=0.05))[:, 1].mean()
    meeting = step_durations(Work(64, 1, 1.0, spread=0.05, group=8, exchanges=15))[:, 1].mean()
    assert meeting > alone


def test_failures_by_chance_cost_what_the_first_order_formula_says():
    from raphael_dist.planning.checkpoints import lost_share

    survival = Survival(save_every=100, stall_s=1.0, write_s=0.0, mtbf_s=20_000.0, restart_s=50.0)
    results = [simulate(CALM, survival, seconds=1e6, seed=seed) for seed in range(4)]
    lost = np.mean([1 - r.steps / r.seconds for r in results])
    assert lost == pytest.approx(lost_share(100.0, 1.0, 0.0, 20_000.0, 50.0), rel=0.1)


def test_ten_thousand_ranks_for_a_week():
    work = Work(10_000, 20_000, 0.1, 0.02, spread=0.01)
    result = simulate(work, Survival(600, 0.01, 2.0, 18_000.0, 300.0), seconds=7 * 86400)
    assert 0.8 < result.images_per_s / (20_000 / 0.12) < 0.96
