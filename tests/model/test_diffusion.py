"""The noise schedule equals diffusers'. Timesteps depend only on (seed, position) and cover a global batch evenly."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from raphael_dist.config.model_sections import Diffusion
from raphael_dist.model.diffusion import (
    NoiseSchedule,
    alphas_cumprod,
    denoise_loss_B,
    draw_timestep,
    late_start_warning,
    make_scheduler,
)

SCHEDULES = pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
GLOBAL_BATCHES = pytest.mark.parametrize("global_batch_size", [1, 7, 64, 1000, 2000])


def theirs(schedule: str, prediction: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=schedule, prediction_type=prediction)


@SCHEDULES
def test_abar_is_that_of_diffusers(schedule):
    abar = alphas_cumprod(Diffusion(schedule=schedule))
    torch.testing.assert_close(abar, theirs(schedule).alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert abar.dtype == torch.float32
    assert (abar.diff() < 0).all()


@SCHEDULES
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_target_are_those_of_diffusers(schedule, prediction):
    ours = NoiseSchedule.create(Diffusion(schedule=schedule, prediction=prediction))
    reference = theirs(schedule, prediction)
    torch.manual_seed(0)
    x0, noise, t = torch.randn(5, 4, 6, 8), torch.randn(5, 4, 6, 8), torch.tensor([0, 1, 400, 998, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), reference.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
    expected = noise if prediction == "epsilon" else reference.get_velocity(x0, noise, t)
    torch.testing.assert_close(ours.target(x0, noise, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "steps", "first"), [
    ("ddim", 5, 801), ("ddim", 25, 961), ("ddim", 30, 958), ("ddim", 50, 981), ("dpm++", 600, 999),
    ("ddim", 150, 895), ("ddim", 334, 667), ("ddim", 600, 600),
])  # fmt: skip
def test_sampling_that_starts_far_from_noise_warns(name, steps, first):
    scheduler = make_scheduler(Diffusion(), name)
    scheduler.set_timesteps(steps)
    assert int(scheduler.timesteps[0]) == first
    message = late_start_warning(scheduler)
    assert (message is None) == (first > 900 or steps < 10)
    if message:
        better = make_scheduler(Diffusion(), name)
        better.set_timesteps(int(re.search(r"Use (\d+) steps", message)[1]))
        assert late_start_warning(better) is None


def test_noise_is_small_at_first_and_dominant_at_last_timestep():
    # The paper prints the two roots swapped; this is the standard order.
    schedule, x0, noise = NoiseSchedule.create(Diffusion()), torch.full((1, 1, 1, 1), 5.0), torch.full((1, 1, 1, 1), -1.0)
    assert schedule.add_noise(x0, noise, torch.tensor([0])).item() == pytest.approx(5, abs=0.05)
    assert schedule.add_noise(x0, noise, torch.tensor([999])).item() == pytest.approx(-1, abs=0.5)


def test_the_denoising_loss_is_each_samples_mean_square_in_float32():
    prediction, target = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(2, 1, 2, 2)
    target[1, 0, 0] = 3.0  # two of four entries differ by 3
    assert denoise_loss_B(prediction, target).tolist() == [0, 4.5]


@GLOBAL_BATCHES
@pytest.mark.parametrize("stratified", [True, False])
def test_timestep_depends_only_on_seed_and_position(global_batch_size, stratified):
    config = Diffusion(stratified=stratified)
    positions = [*np.random.default_rng(0).permutation(40).tolist(), 10**12]
    first = {p: draw_timestep(config, 3, p, global_batch_size) for p in positions}
    assert all(draw_timestep(config, 3, p, global_batch_size) == t for p, t in sorted(first.items()))
    assert first != {p: draw_timestep(config, 4, p, global_batch_size) for p in positions}
    assert all(type(t) is int and 0 <= t < 1000 for t in first.values())


@GLOBAL_BATCHES
@pytest.mark.parametrize("step", [0, 5])
def test_a_global_batch_takes_one_timestep_from_each_stratum(global_batch_size, step):
    timesteps = [
        draw_timestep(Diffusion(), 1, step * global_batch_size + i, global_batch_size) for i in range(global_batch_size)
    ]
    for k, t in enumerate(sorted(timesteps)):  # stratum k is [k, k + 1) * T / G, and t a whole number within it
        assert int(k * 1000 / global_batch_size) <= t <= (k + 1) * 1000 / global_batch_size
    if global_batch_size > 60:
        assert timesteps != sorted(timesteps)


@pytest.mark.parametrize("global_batch_size", [32, 2000])
@pytest.mark.parametrize("run", [2, 4, 8, 16])
def test_any_run_of_positions_covers_the_timesteps_evenly(global_batch_size, run):
    """Ranks that share time experts process such a run: each of `run` equal ranges of timesteps has one sample."""
    for step in range(3):
        timesteps = [
            draw_timestep(Diffusion(), 5, step * global_batch_size + i, global_batch_size) for i in range(global_batch_size)
        ]
        for first in range(0, global_batch_size - run + 1, 3):
            gaps = np.diff(sorted(timesteps[first : first + run]))
            # one in each 1/run of a range that was turned: neighbours are less than two ranges apart
            assert gaps.max() < 2 * 1000 / run + 2 * 1000 / global_batch_size + 2


def test_time_experts_of_a_group_are_loaded_evenly():
    """8 samples per group, 4 experts with a quarter of the range each: two samples per expert, at random 0 to 8."""
    for step in range(5):
        timesteps = [draw_timestep(Diffusion(), 1, step * 2000 + i, 2000) for i in range(2000)]
        loads = np.stack([np.bincount(np.array(timesteps[g : g + 8]) // 250, minlength=4) for g in range(0, 2000, 8)])
        assert (loads == 2).all()


def test_strata_differ_between_steps():
    deals = {tuple(draw_timestep(Diffusion(), 0, s * 8 + i, 8) // 125 for i in range(8)) for s in range(20)}
    assert len(deals) > 15


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("position", [0, 5, 37])
@pytest.mark.parametrize("global_batch_size", [13, 16, 20])
def test_each_position_is_uniform_over_the_timesteps(position, stratified, global_batch_size):
    config = Diffusion(stratified=stratified)
    draws = [draw_timestep(config, seed, position, global_batch_size) for seed in range(4000)]
    counts = np.bincount(np.array(draws) // 50, minlength=20)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand by a uniform draw


@pytest.mark.parametrize("num_timesteps", [1, 10])
def test_few_timesteps_stay_in_range(num_timesteps):
    draws = {draw_timestep(Diffusion(num_timesteps=num_timesteps), 0, p, 32) for p in range(320)}
    assert draws == set(range(num_timesteps))
