"""Rectified flow (`diffusion.prediction=flow`): its path and target, sampling, configuration, and diffusers' scheduler."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

from raphael_dist.config.model_sections import Diffusion
from raphael_dist.config.schema import load_config
from raphael_dist.convert.layouts.dense import scheduler_settings
from raphael_dist.data.features.encoders import TextFeatures
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule, make_scheduler
from raphael_dist.sampling.sampler import sample_latents

FLOW = Diffusion(prediction="flow")
TEXT = TextFeatures(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long))


def test_flow_noise_is_that_of_diffusers_and_the_target_its_derivative() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timestep, schedule, scheduler = torch.tensor([1, 400, 999]), NoiseSchedule.create(FLOW), make_scheduler(FLOW, "ddim")
    expected = [scheduler.scale_noise(x0[i : i + 1], timestep[i : i + 1].float(), noise[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(schedule.add_noise(x0, noise, timestep), torch.cat(expected))
    difference = schedule.add_noise(x0, noise, timestep + 1) - schedule.add_noise(x0, noise, timestep)
    torch.testing.assert_close(1000 * difference, schedule.target(x0, noise, timestep), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_sampling_a_flow_ends_at_the_image_of_an_exact_model(strength: float) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)

    def exact(x: torch.Tensor, timestep: torch.Tensor, _: TextFeatures) -> torch.Tensor:
        assert 1 <= timestep[0] <= 1000
        return (x - x0) * 1000 / timestep.view(-1, 1, 1, 1)

    start = None if strength == 1 else torch.randn(2, 4, 2, 2)
    scheduler = make_scheduler(FLOW, "euler")
    drawn = sample_latents(exact, scheduler, noise, TEXT, TEXT, steps=6, guidance=1, start_BChw=start, strength=strength)
    torch.testing.assert_close(drawn, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "override", ["diffusion.min_snr_gamma=5", "diffusion.zero_terminal_snr=true", "sample.scheduler=dpm++"]
)
def test_settings_without_a_meaning_for_a_flow_are_refused(override: str) -> None:
    load_config("raphael-3b", ["diffusion.prediction=flow"])
    with pytest.raises(UserError, match=override.split("=")[0]):
        load_config("raphael-3b", ["diffusion.prediction=flow", override])
    with pytest.raises(UserError, match="dpm"):
        make_scheduler(FLOW, "dpm++")


def test_exported_flow_scheduler_is_read_back_and_shifts_are_refused(tmp_path: Path) -> None:
    make_scheduler(FLOW, "ddim").save_pretrained(tmp_path / "scheduler")
    assert isinstance(
        FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler"), FlowMatchEulerDiscreteScheduler
    )
    assert Diffusion(**scheduler_settings(tmp_path)) == FLOW
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 3.0}))
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler uses another kind"):
        scheduler_settings(tmp_path)
