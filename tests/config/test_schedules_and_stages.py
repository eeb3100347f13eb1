"""Additions to the paper's training: each against its formula, off by default, fixed for a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from transformers import get_scheduler

from raphael_dist.config.model_sections import Diffusion
from raphael_dist.config.resume_check import changed_fields
from raphael_dist.config.schema import Config, load_config
from raphael_dist.config.training_stages import every_stage, stage_at
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.engine.ema import Ema
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule, alphas_cumprod, draw_offset, make_scheduler, min_snr_weight_B
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.lr_schedule import annealing_factor, learning_rate
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.forks import Forks
from tests.lib.synthetic import plain_fragments, synthetic_batch, tiny_config


def test_paper_presets_use_no_additions() -> None:
    for preset in ("raphael-3b", "raphael-sd2", "sd2-dense"):
        config = load_config(preset)
        assert (config.diffusion.min_snr_gamma, config.diffusion.offset_noise, config.train.stages) == (0, 0, ())
        assert (config.diffusion.zero_terminal_snr, config.ema.start_step, config.optim.lr_schedule_args) == (False, 0, {})


# ---- the loss and the noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_diffusers(prediction: str) -> None:
    """Their formula, by their SNR: min(SNR, gamma) / SNR, for v / (SNR + 1)."""
    scheduler, gamma = make_scheduler(Diffusion(prediction=prediction), "ddim"), 5.0
    t = torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(scheduler, t)
    capped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    expected = capped / (snr if prediction == "epsilon" else snr + 1)
    weights = min_snr_weight_B(scheduler.alphas_cumprod[t], gamma, prediction)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert min_snr_weight_B(torch.zeros(1), gamma, "v_prediction") == 0, "no signal, no division by it"


def test_min_snr_weights_trained_loss_but_not_logged_loss() -> None:
    plain, weighted = tiny_config(), tiny_config(diffusion={"min_snr_gamma": 0.5}, edge={"weight": 0.0})
    plain = plain.model_copy(update={"edge": weighted.edge})
    model = RaphaelUNet(plain)
    batch, schedule = (
        synthetic_batch(plain, [(p, 1.0) for p in range(5)], model.num_blocks),
        NoiseSchedule.create(plain.diffusion),
    )
    before, after = (compute_losses(model, batch, schedule, config, torch.float32) for config in (plain, weighted))
    weight = min_snr_weight_B(schedule.abar_T[batch.timestep], 0.5, "epsilon")
    torch.testing.assert_close(after.total, before.total * weight)
    torch.testing.assert_close(after.denoise, before.denoise)
    assert (weight < 1).any()


def test_zero_terminal_snr_equals_paper_and_sampling_starts_there() -> None:
    config = Diffusion(prediction="v_prediction", zero_terminal_snr=True)
    abar = alphas_cumprod(config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(abar, expected, rtol=2e-4, atol=1e-7)
    assert abar[-1] == 0
    assert abar[0] == pytest.approx(float(alphas_cumprod(Diffusion())[0]), abs=1e-6)
    for name in ("ddim", "dpm++", "euler"):
        scheduler = make_scheduler(config, name)
        scheduler.set_timesteps(20)
        assert int(scheduler.timesteps[0]) == 999
        torch.testing.assert_close(scheduler.alphas_cumprod[:-1], abar[:-1], rtol=2e-4, atol=1e-7)
    schedule, x0, noise = NoiseSchedule.create(config), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(x0, noise, last), noise)
    assert torch.equal(schedule.target(x0, noise, last), -x0)


def test_offset_noise_shifts_whole_channels() -> None:
    offsets = torch.stack([draw_offset(1, position, 4) for position in range(500)])
    assert offsets.shape == (500, 4, 1, 1)
    assert (float(offsets.mean()), float(offsets.std())) == pytest.approx((0, 1), abs=0.05)
    assert torch.equal(draw_offset(1, 7, 4), offsets[7])
    nothing: Any = None
    plain, shifted = (
        BatchBuilder(tiny_config(diffusion={"offset_noise": s}), nothing, nothing, num_blocks=1) for s in (0.0, 0.3)
    )
    shape = torch.Size((4, 6, 6))
    shift = shifted._noise(7, shape) - plain._noise(7, shape)
    torch.testing.assert_close(shift, 0.3 * draw_offset(0, 7, 4).expand(4, 6, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1, 0.75, 0.5, 0, 0]), ("cosine", [1, 0.853553, 0.5, 0, 0]), ("exponential", [1, 0.316228, 0.1, 0, 0])],
)
def test_gate_noise_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    assert [annealing_factor(schedule, done) for done in (0, 0.25, 0.5, 1, 3)] == pytest.approx(expected, abs=1e-6)


# ---- the optimizer --------------------------------------------------------------------------------------------------

SCHEDULES = [
    ("linear", {}), ("cosine_with_restarts", {"num_cycles": 3}), ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {"timescale": 40}), ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "num_stable_steps": 20}), ("cosine", {}),
]  # fmt: skip


@pytest.mark.parametrize(("decay", "arguments"), SCHEDULES)
def test_learning_rates_equal_transformers(decay: str, arguments: dict[str, float]) -> None:
    config = tiny_config(
        optim={"lr": 0.02, "warmup_steps": 10, "lr_schedule": decay, "lr_schedule_args": arguments}, train={"max_steps": 100}
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    theirs = get_scheduler(decay, optimizer, 10, 100, scheduler_specific_kwargs=dict(arguments)).lr_lambdas[0]
    assert [learning_rate(config, step) for step in range(1, 11)] == pytest.approx([0.002 * s for s in range(1, 11)])
    # Their step 10 is the peak, the first after the warm-up, as our step 11 is.
    expected = [0.02 * theirs(step) for step in range(10, 100)]
    assert [learning_rate(config, step) for step in range(11, 101)] == pytest.approx(expected)
    assert min(expected) < 0.02


def test_wrong_schedule_arguments_are_named() -> None:
    cases = {
        ("cosine", "{power: 2}"): "power is not one of them (it has no arguments)",
        ("polynomial", "{powr: 2}"): "powr is not one of them (its arguments are power, lr_end)",
        (
            "warmup_stable_decay",
            "{}",
        ): "requires the argument num_decay_steps, but optim.lr_schedule_args={} does not have it",
        ("cosin", "{}"): "optim.lr_schedule=cosin must be",
    }
    for (decay, arguments), text in cases.items():
        with pytest.raises(UserError) as refusal:
            load_config("emoji-tiny", [f"optim.lr_schedule={decay}", f"optim.lr_schedule_args={arguments}"])
        assert text in str(refusal.value)
    with pytest.raises(UserError, match=r"diffusion.zero_terminal_snr=true requires diffusion.prediction=v_prediction"):
        load_config("emoji-tiny", ["diffusion.zero_terminal_snr=true", "diffusion.prediction=epsilon"])


def test_average_equals_weights_until_start_step_then_warms_up() -> None:
    config = tiny_config(ema={"start_step": 2, "decay": 0.9})
    fragments = plain_fragments(RaphaelUNet(config))
    ema, weight = Ema(fragments, config.ema), fragments.masters()[0]
    for step, expected in ((1, 1.0), (2, 2.0), (3, 2.0 * 2 / 11 + 3.0 * 9 / 11)):
        with torch.no_grad():
            weight.fill_(step)
        ema.update(step)
        assert float(ema.values[0].view(-1)[0]) == pytest.approx(expected)
    assert ema.decay(1002) == pytest.approx(0.9)


# ---- stages ---------------------------------------------------------------------------------------------------------

STAGES = [
    {"until": 3, "set": {"image.buckets": [[8, 8]], "train.global_batch_size": 12, "optim.lr": 0.01}},
    {"set": {"image.buckets": [[8, 8]], "train.global_batch_size": 9, "optim.lr": 0.02}},
]


def staged(stages: list[dict], **sections: dict) -> Config:
    return tiny_config(**{**sections, "train": {**sections.get("train", {}), "stages": stages}})


def test_stage_of_a_step_sets_its_values() -> None:
    config = staged(STAGES, train={"max_steps": 7, "micro_batch_size": 3})
    for step, batch, until in ((0, 12, 3), (2, 12, 3), (3, 9, 7), (6, 9, 7), (7, 9, 7)):
        stage, since, end = stage_at(config, step)
        assert (stage.train.global_batch_size, since, end) == (batch, 0 if until == 3 else 3, until)
    assert [stage.optim.lr for stage in every_stage(config)] == [0.01, 0.02]
    plain = tiny_config()
    assert stage_at(plain, 5) == (plain, 0, plain.train.max_steps)
    # Which stage a checkpoint is of makes no difference to what run it is; other stages do.
    first, second = every_stage(config)
    assert changed_fields(first, second) == {}
    assert changed_fields(first, every_stage(staged(STAGES[1:]))[0]).keys() == {"train.stages"}


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([{"set": {"model.channels": [8]}}], "stage 1 sets 'model.channels'"),
        ([{"set": {"optim.lrr": 1}}], "did you mean 'optim.lr'"),
        ([{"set": {"optim.lr": -1}}], "train.stages: the settings of stage 1 are not valid: optim.lr=-1"),
        ([{"until": 5, "set": {}}], "requires `until` in every stage but the last"),
        ([{"until": 5, "set": {}}, {"until": 5, "set": {}}, {"set": {}}], "but the values of `until` are [5, 5]"),
        ([{"until": 5, "set": {"optim.lr": 1}}, {"set": {}}], "optim.lr is missing in stage 2"),
    ],
)
def test_wrong_stages_are_one_line(stages: list[dict], text: str) -> None:
    with pytest.raises(UserError) as refusal:
        every_stage(staged(stages))
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "stops", [(4, 6), pytest.param((6,), marks=pytest.mark.slow), pytest.param((2, 4, 6), marks=pytest.mark.slow)]
)
def test_run_in_stages_equals_consecutive_runs_also_resumed(stops: tuple[int, ...], forks: Forks, tmp_path: Path) -> None:
    def spec(steps: int, stages: list[dict], **more: dict) -> dict:
        train = {"max_steps": steps, "log_every": 1, "micro_batch_size": 3, **more.pop("train", {})}
        base = {"optim": {"lr": 0.5, "eps": 1e-3}, "checkpoint": {"every": 2, "keep": 9}}
        sections = {name: {**base.get(name, {}), **more.get(name, {})} for name in base | more}
        return {"stage": 2, "sections": {**sections, "train": {**train, "stages": stages}}}

    staged_run, by_hand = tmp_path / "staged", tmp_path / "hand"
    for steps in stops:
        forks.must(staged_run, 2, **spec(steps, STAGES))
    assert "step 3: the stage is over" in (staged_run / "train.log").read_text()
    metrics = read_metrics(staged_run / "metrics.jsonl")
    assert [step for step, _ in metrics["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [lr for _, lr in metrics["optim/lr"]] == pytest.approx([0.01] * 3 + [0.02] * 3)
    # The same run without stages.
    forks.must(by_hand, 2, **spec(3, [], optim={"lr": 0.01}, train={"global_batch_size": 12}))
    change = {"allow_change": ["optim.lr", "train.global_batch_size"]}
    forks.must(by_hand, 2, **spec(6, [], optim={"lr": 0.02}, train={"global_batch_size": 9}, run=change))
    assert files(staged_run) == files(by_hand)


def files(run: Path) -> dict[str, str]:
    manifest = json.loads((run / "checkpoints/step-00000006/manifest.json").read_text())
    assert manifest["samples_seen"] == 3 * 12 + 3 * 9
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}
