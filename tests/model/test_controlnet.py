"""ControlNet: results equal diffusers', on any number of ranks; it follows an edge map, and its base model is unchanged."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

import convert_checkpoint
from raphael_dist import sample
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config.schema import Config
from raphael_dist.convert.controlnet_files import read_control, write_control
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.errors import UserError
from raphael_dist.model.controlnet import ControlNet, add_control
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import UNetInput
from raphael_dist.sampling.prompts import read_edges
from tests.lib.adapters import STEPS, canonical, hashes, losses_of, one_process, sample_image
from tests.lib.forks import Forks, output_of
from tests.lib.launch import train_many
from tests.lib.synthetic import SIZE, TEXT_WIDTH, TOKENS, TREE, adapted_model, tiny_config
from tests.sampling.test_sampling import config_of

CONTROL = {"control": {"enabled": True}, "run": {"init_from": "the base"}}


def inputs(batch: int = 2) -> tuple[Tensor, ...]:
    """Return latents, timesteps, text tokens, their mask and the end-of-text indices."""
    draw = torch.Generator().manual_seed(4)
    x, text = torch.randn(batch, 4, SIZE, SIZE, generator=draw), torch.randn(batch, TOKENS, TEXT_WIDTH, generator=draw)
    timestep, end = torch.tensor([7, 800])[:batch], torch.full((batch,), TOKENS - 1)
    return x, timestep, text, torch.ones(batch, TOKENS, dtype=torch.bool), end


def test_new_control_has_no_effect_and_only_it_is_trained() -> None:
    config = tiny_config(**CONTROL)
    torch.manual_seed(0)
    model = RaphaelUNet(config)
    before = model(*inputs()).prediction
    add_control(model, config, 0)
    edge = torch.rand(2, SIZE, SIZE)
    assert torch.equal(model(*inputs(), None, edge).prediction, before)
    model = adapted_model(config)
    assert torch.equal(model(*inputs()).prediction, before), "without a map the model is its base"
    assert not torch.allclose(model(*inputs(), None, edge).prediction, before, rtol=1e-3)
    assert not torch.allclose(
        model(*inputs(), None, edge).prediction, model(*inputs(), None, 1 - edge).prediction, rtol=1e-3
    )
    losses_of(model, config).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.startswith("control."), name


def test_control_without_experts_equals_diffusers(tmp_path: Path) -> None:
    sizes = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]}
    config = tiny_config(model={**TREE["model"], **sizes}, **CONTROL)
    model = adapted_model(config)
    assert isinstance(model.control, ControlNet)
    write_control({name: p.detach() for name, p in model.control.named_parameters()}, config, tmp_path / "control")
    theirs = ControlNetModel.from_pretrained(tmp_path / "control").eval()
    x, timestep, text, mask, end = inputs()
    edge = torch.rand(2, SIZE, SIZE)
    with torch.no_grad():
        ours = model.control(UNetInput(x, timestep, text, mask, end, None), edge)
        actual = theirs(x, timestep, text, edge.unsqueeze(1).expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours.skips, tuple(actual.down_block_res_samples), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.middle, actual.mid_block_res_sample, rtol=1e-4, atol=1e-5)
    again = read_control(tmp_path / "control", config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.control.parameters(), strict=True))


@pytest.mark.parametrize(
    "saved",
    [{"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "100KB"}],
    ids=["variant", "bin", "sharded"],
)
def test_control_is_read_from_all_weight_files_of_diffusers(tmp_path: Path, saved: dict[str, Any]) -> None:
    sizes = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]}
    config = tiny_config(model={**TREE["model"], **sizes}, **CONTROL)
    control = adapted_model(config).control
    assert isinstance(control, ControlNet)
    write_control({name: p.detach() for name, p in control.named_parameters()}, config, tmp_path / "control")
    ControlNetModel.from_pretrained(tmp_path / "control").save_pretrained(tmp_path / "other", **saved)
    assert not (tmp_path / "other" / "diffusion_pytorch_model.safetensors").exists()
    again = read_control(tmp_path / "other", config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), control.parameters(), strict=True))


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[2, 3], pytest.param([0, 1], marks=pytest.mark.slow)], ids=str)
def test_control_on_two_ranks_equals_one_process(stages: list[int], tmp_path: Path) -> None:
    extra = {"train": {"global_batch_size": 7, "check_gradients": True}, "optim": {"kind": "sgd", "max_grad_norm": 0.5}}
    specs = [
        {
            "sections": {**CONTROL, **extra, "model": {"checkpoint_activations": "all" if stage == 3 else "none"}},
            "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
            "steps": STEPS,
        }
        for stage in stages
    ]
    weights, losses = one_process(tiny_config(**CONTROL, **extra, model={"checkpoint_activations": "none"}))
    for actual in train_many(tmp_path, 2, specs):
        assert actual["losses"] == pytest.approx(losses, rel=1e-5)
        assert actual["weights"].keys() == weights.keys()
        for name, value in weights.items():
            assert (actual["weights"][name] - value).abs().max() < 1e-4 * value.abs().max(), name


# ---- runs -----------------------------------------------------------------------------------------------------------


def spec(base: Path, steps: int = 4) -> dict[str, Any]:
    sections = {
        "control": {"enabled": True},
        "run": {"init_from": str(base)},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": steps, "log_every": 1},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return {"sections": sections, "stage": 2}


@pytest.mark.slow
def test_control_run_resumes_bit_for_bit_and_keeps_its_base(forks: Forks, tmp_path: Path) -> None:
    base = canonical(tmp_path / "base", tiny_config())
    before = hashes(base)
    forks.must(tmp_path / "whole", 2, **spec(base))
    forks.must(tmp_path / "run", 2, **spec(base, steps=2))
    forks.must(tmp_path / "run", 2, **spec(base))
    assert hashes(base) == before
    whole, run = (CheckpointReader(tmp_path / name / "checkpoints" / "step-00000004") for name in ("whole", "run"))
    assert whole.incomplete() is None
    assert {name.partition(".")[0] for name in whole.shapes} == {"control"}
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in whole.shapes:
            assert torch.equal(run.whole(kind, name), whole.whole(kind, name)), f"{kind} of {name}"
    other = canonical(tmp_path / "other", tiny_config(), seed=6)
    assert forks.run(tmp_path / "run", 2, **spec(other, steps=6)) == [2, 2]
    assert "a base model with other weights" in output_of(tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"contains only a ControlNet, without the base model.*--to controlnet"):
        open_checkpoint("auto", tmp_path / "run")
    assert (
        convert_checkpoint.main(["--from", "auto", str(tmp_path / "run"), "--to", "controlnet", str(tmp_path / "control")])
        == 0
    )
    exported, read = (read_control(tmp_path / name, tiny_config()) for name in ("control", "run"))
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), read.parameters(), strict=True))
    wider = tiny_config(model={"expert_width": [24, 28]})
    with pytest.raises(UserError, match=r"must fit the model, but the tensor"):
        read_control(tmp_path / "control", wider)


def test_images_follow_an_edge_map(tmp_path: Path) -> None:
    config = config_of()
    base = canonical(tmp_path / "base", config)
    model = adapted_model(Config(**{**config.model_dump(), "sample": {}, **CONTROL}))
    assert model.control is not None
    write_control({name: p.detach() for name, p in model.control.named_parameters()}, config, tmp_path / "control")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "map.png")

    drawn = partial(sample_image, base, tmp_path)
    before = hashes(base)
    following = (
        "--control",
        str(tmp_path / "map.png"),
        "--control-from",
        str(tmp_path / "control"),
        "--control-kind",
        "map",
    )
    plain, followed = drawn("plain"), drawn("followed", *following)
    assert abs(followed - plain).max() > 2
    assert (drawn("none", *following, "--control-scale", "0") == plain).all()
    assert hashes(base) == before
    assert sample.main(["--checkpoint", str(base), "--prompt", "a", "--control", "x.png"]) == 2


def test_control_image_is_an_edge_map_or_is_converted_by_canny(tmp_path: Path) -> None:
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 255
    Image.fromarray(square).save(tmp_path / "square.png")
    as_map, canny = (read_edges(tmp_path / "square.png", (32, 32), kind) for kind in ("map", "canny"))
    assert (as_map * 255 == square).all()
    assert canny.shape == (32, 32)
    assert canny[16, 16] == 0
    assert canny.max() == 1
    with pytest.raises(UserError, match=r"--control=.*nothing.png cannot be read"):
        read_edges(tmp_path / "nothing.png", (32, 32), "map")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": {}}, "requires run.init_from, .* null"),
        ({"edge": {"weight": 0}}, "requires edge.weight above 0, .* 0"),
        ({"lora": {"rank": 2}}, "requires lora.rank=0, but it is 2"),
        ({"parallel": {"space_ep": 2}}, "requires parallel.space_ep=1"),
        ({"sample": {"prompts": ["a"]}}, "sample.images .* images is 0 and that of captions is 1"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**{**CONTROL, **arguments})
