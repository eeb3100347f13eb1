"""ControlNet: what it computes is diffusers', on any ranks as on one; it follows a map, and its base stays as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from raphael_dist import control as command
from raphael_dist import sample
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config import Config
from raphael_dist.convert.control import read_control, write_control
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.errors import UserError
from raphael_dist.model.control import ControlNet, add_control
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.sampling.prompts import read_edges
from tests.beside import STEPS, canonical, hashes, losses_of, one_process
from tests.forks import Forks, output_of
from tests.launch import train_many
from tests.synthetic import SIZE, TEXT_WIDTH, TOKENS, TREE, adapted_model, tiny_config
from tests.test_sampling import config_of

CONTROL = {"control": {"enabled": True}, "run": {"init_from": "the base"}}


def inputs(batch: int = 2) -> tuple[Tensor, ...]:
    """Return latents, timesteps, text, its mask and its ends."""
    draw = torch.Generator().manual_seed(4)
    x, text = torch.randn(batch, 4, SIZE, SIZE, generator=draw), torch.randn(batch, TOKENS, TEXT_WIDTH, generator=draw)
    timestep, end = torch.tensor([7, 800])[:batch], torch.full((batch,), TOKENS - 1)
    return x, timestep, text, torch.ones(batch, TOKENS, dtype=torch.bool), end


def test_a_new_control_changes_nothing_and_is_all_that_is_trained() -> None:
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


def test_without_experts_it_is_diffusers_own(tmp_path: Path) -> None:
    sizes = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]}
    config = tiny_config(model={**TREE["model"], **sizes}, **CONTROL)
    model = adapted_model(config)
    assert isinstance(model.control, ControlNet)
    write_control({name: p.detach() for name, p in model.control.named_parameters()}, config, tmp_path / "control")
    theirs = ControlNetModel.from_pretrained(tmp_path / "control").eval()
    x, timestep, text, mask, end = inputs()
    edge = torch.rand(2, SIZE, SIZE)
    with torch.no_grad():
        ours = model.control(x, timestep, text, mask, end, None, edge)
        found = theirs(x, timestep, text, edge.unsqueeze(1).expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours.skips, tuple(found.down_block_res_samples), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.middle, found.mid_block_res_sample, rtol=1e-4, atol=1e-5)
    again = read_control(tmp_path / "control", config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.control.parameters(), strict=True))


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[2, 3], pytest.param([0, 1], marks=pytest.mark.slow)], ids=str)
def test_two_ranks_train_a_control_as_one_process_does(stages: list[int], tmp_path: Path) -> None:
    more = {"train": {"global_batch": 7, "check_gradients": True}, "optim": {"kind": "sgd", "clip": 0.5}}
    specs = [
        {
            "sections": {**CONTROL, **more, "model": {"checkpoint_activations": "all" if stage == 3 else "none"}},
            "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
            "steps": STEPS,
        }
        for stage in stages
    ]
    weights, losses = one_process(tiny_config(**CONTROL, **more, model={"checkpoint_activations": "none"}))
    for found in train_many(tmp_path, 2, specs):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert found["weights"].keys() == weights.keys()
        for name, value in weights.items():
            assert (found["weights"][name] - value).abs().max() < 1e-4 * value.abs().max(), name


# ---- runs -----------------------------------------------------------------------------------------------------------


def spec(base: Path, steps: int = 4) -> dict[str, Any]:
    sections = {
        "control": {"enabled": True},
        "run": {"init_from": str(base)},
        "train": {"global_batch": 8, "micro_batch": 2, "max_steps": steps, "log_every": 1},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return {"sections": sections, "stage": 2}


@pytest.mark.slow
def test_a_run_holds_the_control_alone_goes_on_bit_for_bit_and_leaves_its_base(forks: Forks, tmp_path: Path) -> None:
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
    assert "another model beside it" in output_of(tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"holds the control of .* alone"):
        open_checkpoint("auto", tmp_path / "run")
    assert command.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "control")]) == 0
    exported, read = (read_control(tmp_path / name, tiny_config()) for name in ("control", "run"))
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), read.parameters(), strict=True))
    wider = tiny_config(model={"expert_width": [24, 28]})
    with pytest.raises(UserError, match="does not fit the model; give the one that it was trained beside"):
        read_control(tmp_path / "control", wider)


def test_pictures_follow_a_map(tmp_path: Path) -> None:
    config = config_of()
    base = canonical(tmp_path / "base", config)
    model = adapted_model(Config(**{**config.model_dump(), "sample": {}, **CONTROL}))
    assert model.control is not None
    write_control({name: p.detach() for name, p in model.control.named_parameters()}, config, tmp_path / "control")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "map.png")

    def drawn(name: str, *more: str) -> Any:
        out = tmp_path / name
        given = ["--checkpoint", str(base), "--prompt", "a", "--out", str(tmp_path / "grid.png"), "--images", str(out)]
        assert sample.main([*given, *more]) == 0
        return np.asarray(Image.open(out / "000000.png")).astype(int)

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


def test_edges_of_a_picture_are_made_by_canny_or_are_the_picture(tmp_path: Path) -> None:
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 255
    Image.fromarray(square).save(tmp_path / "square.png")
    as_map, canny = (read_edges(tmp_path / "square.png", (32, 32), kind) for kind in ("map", "canny"))
    assert (as_map * 255 == square).all()
    assert canny.shape == (32, 32)
    assert canny[16, 16] == 0
    assert canny.max() == 1
    with pytest.raises(UserError, match=r"--control .*nothing.png: cannot be read"):
        read_edges(tmp_path / "nothing.png", (32, 32), "map")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": {}}, "needs run.init_from"),
        ({"edge": {"weight": 0}}, "needs edge.weight above 0"),
        ({"lora": {"rank": 2}}, "needs lora.rank=0"),
        ({"parallel": {"space_ep": 2}}, "needs parallel.space_ep=1"),
        ({"sample": {"prompts": ["a"]}}, "sample.pictures has 0 entries, but sample.prompts has 1"),
    ],
)
def test_mistakes_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**{**CONTROL, **given})
