"""From a dense U-Net of diffusers to RAPHAEL: the same function at step 0, and every new part learns."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.initial import load_initial
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.layouts.dense import ldm_key
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from tests.checkpoints import assert_same, handmade_canonical, random_state, read_state
from tests.synthetic import plain_fragments, synthetic_batch

SIZES = {"channels": [32, 64, 64], "attention": [True, True, False], "expert_width": [128, 256, 256], "head_dim": 16,
         "norm_groups": 16, "text_width": 12, "gate_width": 9}  # fmt: skip
TARGET = {"model": {**SIZES, "space_experts": 3, "time_experts": 2, "time_activation": "geglu"}, "edge": {"channels": 4}}


def stable_diffusion(seed: int = 0, **changes) -> UNet2DConditionModel:
    """Return a randomly initialised U-Net of Stable Diffusion 2's structure, narrow and one level shallower."""
    torch.manual_seed(seed)
    down = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    return UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64, 64),
            "down_block_types": down,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": 12,
            "norm_num_groups": 16,
            "use_linear_projection": True,
            **changes,
        }
    ).eval()


def target(**model) -> Config:
    return config_from_tree({**TARGET, "model": {**TARGET["model"], **model}})


@pytest.mark.parametrize("more", [{}, {"shared_expert": 0.5, "time_routing": "boundaries"}])
def test_the_upcycled_model_computes_what_its_source_computes_and_every_part_learns(tmp_path, more):
    dense, config = stable_diffusion(), target(**more)
    dense.save_pretrained(tmp_path / "sd2/unet")
    convert("dense", tmp_path / "sd2/unet", "canonical", tmp_path / "start", Options(prediction="epsilon"), config)
    model = RaphaelUNet(config)
    load_initial(plain_fragments(model), tmp_path / "start", config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(6)], model.num_blocks)
    inputs = (batch.x0, batch.timestep, batch.text)
    with torch.no_grad():
        ours = model(*inputs, batch.text_mask, batch.end, batch.gate_noise).prediction
        theirs = dense(*inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    # One step of gradient: the zero layers move, the experts part, and then the layers before them move too.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compute_losses(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32).total.mean().backward()
        optimizer.step()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    experts = [p for n, p in model.named_parameters() if n.endswith(("space_moe.w2", "time_moe.w1"))]
    assert all(not torch.equal(p[0], p[1]) for p in experts)


def test_new_parts_are_those_that_are_missing_and_first_layers_are_those_of_a_new_run(tmp_path):
    dense, config = stable_diffusion(), target()
    dense.save_pretrained(tmp_path / "unet")
    convert("auto", tmp_path / "unet", "raphael", tmp_path / "run", Options(world=3, prediction="epsilon"), config)
    state = read_state("auto", tmp_path / "run")
    fresh, source = RaphaelUNet(config), dense.state_dict()
    new = {name for name, _ in fresh.named_parameters()} - source.keys()
    assert all(any(part in n for part in ("_moe.", ".edge.", "time_gates.", "text_gates.")) for n in new)
    for name, p in fresh.named_parameters():
        value = state["master", name]
        if name in source:
            assert torch.equal(value, source[name])
        elif name.endswith(("space_moe.w1", "space_moe.b1")):
            assert torch.equal(value, p)
        elif name.endswith(("space_moe.w2", "space_moe.b2")):
            assert not value.any()
    assert source.keys() - state.keys()  # the feed-forward layers are now experts


def test_only_experts_in_space_keep_the_feed_forward_layer(tmp_path):
    dense, config = stable_diffusion(), target(time_experts=0)
    dense.save_pretrained(tmp_path / "unet")
    convert("auto", tmp_path / "unet", "canonical", tmp_path / "start", Options(prediction="epsilon"), config)
    state = read_state("auto", tmp_path / "start")
    assert all(torch.equal(state["master", name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("names", ["diffusers", "ldm", "ldm.ckpt"])
def test_a_single_file_gives_what_the_folder_gives(tmp_path, names):
    dense = stable_diffusion()
    dense.save_pretrained(tmp_path / "unet")
    weights = {name: value.contiguous() for name, value in dense.state_dict().items()}
    path = tmp_path / "model.safetensors"
    if names == "diffusers":
        save_file(weights, path)
    else:
        ldm = {f"model.diffusion_model.{ldm_key(n, 2, (True, True, False))}": v for n, v in weights.items()}
        theirs = convert_ldm_unet_checkpoint(dict(ldm), {"layers_per_block": 2})
        assert theirs.keys() == weights.keys()
        assert all(torch.equal(theirs[n], v) for n, v in weights.items())
        ldm["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)
        if names == "ldm":
            save_file(ldm, path)
        else:
            path = tmp_path / "model.ckpt"
            torch.save({"state_dict": ldm, "global_step": 3}, path)
    convert("auto", path, "dense", tmp_path / "out", Options(prediction="epsilon"))
    assert_same(read_state("auto", tmp_path / "out"), read_state("auto", tmp_path / "unet"))
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    assert all(torch.equal(again.state_dict()[n], v) for n, v in weights.items())


UNFIT = [
    ({"use_linear_projection": False}, {}, r"use_linear_projection = False; only U-Nets like Stable Diffusion 2's"),
    ({"class_embed_type": "timestep"}, {}, r"class_embed_type = 'timestep'"),
    ({}, {"time_activation": "gelu"}, r"model.time_activation must be geglu.*given gelu"),
    ({}, {"expert_width": [64, 64, 64]}, r"model.expert_width \[128, 256, 256\]; given geglu and \[64, 64, 64\]"),
    (
        {},
        {"time_experts": 0, "expert_width": [200, 300, 300]},
        r"model.expert_width \[128, 256, 256\]; given geglu and \[200",
    ),
    ({}, {"time_experts": 0, "time_activation": "gelu"}, r"model.time_activation must be geglu.*given gelu"),
    ({"norm_eps": 1e-6}, {}, r"norm_eps = 1e-06"),
    ({"mid_block_scale_factor": 2}, {}, r"mid_block_scale_factor = 2"),
    ({"resnet_out_scale_factor": 1.4}, {}, r"resnet_out_scale_factor = 1.4"),
    ({}, {"text_width": 24}, r"model.text_width: the checkpoint in .* has 12, this configuration gives 24"),
]


@pytest.mark.parametrize(("changes", "model", "message"), UNFIT)
def test_what_does_not_fit_is_named(tmp_path, changes, model, message):
    stable_diffusion(**changes).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=message):
        convert("auto", tmp_path / "unet", "canonical", tmp_path / "out", Options(prediction="epsilon"), target(**model))
    assert not (tmp_path / "out").exists()


def starting(config: Config, **run) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def test_a_new_run_says_how_to_start_from_a_dense_folder_and_starts_so(tmp_path):
    dense, config = stable_diffusion(), target()
    dense.save_pretrained(tmp_path / "unet")
    predicts(tmp_path, "epsilon")
    with pytest.raises(UserError, match=r"run.init_from: .* do not fit.*set run.init_missing=\[edge, space, time\]"):
        load_initial(plain_fragments(RaphaelUNet(config)), tmp_path / "unet", config)
    config = starting(config, init_missing=("edge", "space", "time"))
    model = RaphaelUNet(config)
    said = load_initial(plain_fragments(model), tmp_path / "unet", config).describe(tmp_path)
    assert "experts begin as the dense model" in said
    assert "drawn anew: 110 (edge)" in said
    assert "left out there: 44 (time)" in said
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    with torch.no_grad():
        ours = model(batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end, batch.gate_noise).prediction
        theirs = dense(batch.x0, batch.timestep, batch.text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_parts_that_may_differ_are_drawn_anew_or_left_and_all_else_is_taken(tmp_path):
    """Fine-tuning without edge maps, and with captions of another width."""
    config = target()
    handmade_canonical(tmp_path / "before", config, state := random_state(config, ("master",)))
    other = config_from_tree({**TARGET, "model": {**TARGET["model"], "text_width": 20}, "edge": {"weight": 0.0}})
    for missing in ((), ("edge",), ("text",)):
        wanted = r"set run.init_missing=\[(edge, )?(text)?"
        with pytest.raises(UserError, match=wanted):
            load_initial(plain_fragments(RaphaelUNet(other)), tmp_path / "before", starting(other, init_missing=missing))
    config = starting(other, init_missing=("edge", "text"))
    model, drawn = RaphaelUNet(config), RaphaelUNet(config)
    drawn.load_state_dict(model.state_dict())
    initial = load_initial(plain_fragments(model), tmp_path / "before", config)
    anew = {n for n, _ in model.named_parameters() if "attn2.to_k." in n or "attn2.to_v." in n}
    anew |= {n for n, _ in model.named_parameters() if n.startswith("text_gates.") and n.endswith("net.0.weight")}
    assert set(initial.anew) == anew
    assert {n.split(".edge.")[1].split(".")[0] for n in initial.left if ".edge." in n} == {"net"}
    for (name, found), before in zip(model.named_parameters(), drawn.parameters(), strict=True):
        assert torch.equal(found, before if name in anew else state["master", name]), name


def test_another_width_of_the_unet_is_refused_whatever_may_differ(tmp_path):
    handmade_canonical(tmp_path / "before", target(), random_state(target(), ("master",)))
    config = starting(target(channels=[32, 64, 96]), init_missing=("edge", "space", "time", "text"))
    with pytest.raises(UserError, match=r"do not fit .* the model must be the checkpoint's but for edge modules"):
        load_initial(plain_fragments(RaphaelUNet(config)), tmp_path / "before", config)


def predicts(folder: Path, prediction: str) -> None:
    """Write the scheduler that says what a U-Net beside it predicts."""
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_pipelines_scheduler_tells_what_the_unet_predicts(tmp_path, part):
    """Stable Diffusion 2 predicts v, its base variant noise: the weights do not show it."""
    stable_diffusion().save_pretrained(tmp_path / "sd2/unet")
    predicts(tmp_path / "sd2", "v_prediction")
    (tmp_path / "sd2/model_index.json").write_text("{}")
    source = tmp_path / "sd2" / part
    assert open_checkpoint("auto", source).config.diffusion.prediction == "v_prediction"
    said = r"predicts v_prediction, the run trains diffusion.prediction = epsilon; set diffusion.prediction=v_prediction"
    with pytest.raises(UserError, match=f"--config: .* {said}"):
        convert("auto", source, "canonical", tmp_path / "out", Options(), target())
    dense = open_checkpoint("auto", source).config
    fragments = plain_fragments(RaphaelUNet(dense))
    epsilon = dense.model_copy(update={"diffusion": dense.diffusion.model_copy(update={"prediction": "epsilon"})})
    with pytest.raises(UserError, match=f"run.init_from: .* {said}"):
        load_initial(fragments, source, epsilon)
    load_initial(fragments, source, dense)
    with pytest.raises(UserError, match=r"--prediction epsilon: .* says that its model predicts v_prediction"):
        convert("auto", source, "canonical", tmp_path / "out", Options(prediction="epsilon"))
    assert not (tmp_path / "out").exists()


def test_what_a_unet_predicts_is_never_assumed(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"no scheduler beside it says what its model predicts; give --prediction"):
        convert("auto", tmp_path / "unet", "canonical", tmp_path / "out", Options())
    dense = open_checkpoint("auto", tmp_path / "unet").config
    fragments = plain_fragments(RaphaelUNet(dense))
    with pytest.raises(UserError, match=r"run.init_from: no scheduler beside .* convert it with .* --prediction"):
        load_initial(fragments, tmp_path / "unet", dense)
    convert("auto", tmp_path / "unet", "canonical", tmp_path / "v", Options(prediction="v_prediction"))
    assert open_checkpoint("auto", tmp_path / "v").config.diffusion.prediction == "v_prediction"
    with pytest.raises(UserError, match=r"predicts v_prediction, the run trains diffusion.prediction = epsilon"):
        load_initial(fragments, tmp_path / "v", dense)
