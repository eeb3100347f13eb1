"""From a dense U-Net of diffusers to RAPHAEL: the same function at step 0, and every new part learns."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.init_weights import load_initial
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.checkpoints import assert_same, handmade_canonical, random_state, read_state
from tests.lib.ldm_names import ldm_key
from tests.lib.synthetic import plain_fragments, synthetic_batch

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


@pytest.mark.parametrize("changes", [{}, {"shared_expert": 0.5, "time_routing": "boundaries"}])
def test_upcycled_model_computes_the_same_as_its_source_and_learns(tmp_path, changes):
    dense, config = stable_diffusion(), target(**changes)
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


def test_upcycling_initialises_missing_parts_as_in_a_new_run(tmp_path):
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


def test_space_experts_only_keep_the_feed_forward_layer(tmp_path):
    dense, config = stable_diffusion(), target(time_experts=0)
    dense.save_pretrained(tmp_path / "unet")
    convert("auto", tmp_path / "unet", "canonical", tmp_path / "start", Options(prediction="epsilon"), config)
    state = read_state("auto", tmp_path / "start")
    assert all(torch.equal(state["master", name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("names", ["diffusers", "ldm", "ldm.ckpt"])
def test_single_file_gives_the_same_as_a_folder(tmp_path, names):
    dense = stable_diffusion()
    dense.save_pretrained(tmp_path / "unet")
    weights = {name: value.contiguous() for name, value in dense.state_dict().items()}
    path = tmp_path / "model.safetensors"
    if names == "diffusers":
        save_file(weights, path)
    else:
        ldm = {f"model.diffusion_model.{ldm_key(n, 2, (True, True, False))}": v for n, v in weights.items()}
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


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        ("middle_block.1.norm.weight", None, r"mid_block.attentions.0.norm.weight: missing in the file"),
        ("output_blocks.2.1.conv.bias", None, r"lacks the tensor model.diffusion_model.output_blocks.2.*bias"),
        ("input_blocks.3.0.op.bias", None, r"down_blocks.0.downsamplers.0.conv.bias: missing in the file"),
        ("time_embed.0.weight", None, r"time_embedding.linear_1.weight: missing in the file"),
        (None, "label_emb.0.0.weight", r"model.diffusion_model.label_emb.0.0.weight is not part of such a U-Net"),
        (None, "middle_block.3.in_layers.0.weight", r"mid_block.*: .* in the file, missing in the model"),
    ],
)
def test_ldm_file_of_another_structure_is_refused(tmp_path, lost, added, message):
    weights = stable_diffusion().state_dict()
    ldm = {f"model.diffusion_model.{ldm_key(n, 2, (True, True, False))}": v.contiguous() for n, v in weights.items()}
    if lost:
        del ldm[f"model.diffusion_model.{lost}"]
    else:
        ldm[f"model.diffusion_model.{added}"] = torch.zeros(3)
    save_file(ldm, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint("auto", tmp_path / "model.safetensors")


UNFIT = [
    ({"use_linear_projection": False}, {}, r"use_linear_projection=False must be True, as in U-Nets of Stable Diffusion 2"),
    ({"class_embed_type": "timestep"}, {}, r"class_embed_type='timestep' must be None"),
    ({}, {"time_activation": "gelu"}, r"model.time_activation=gelu .* Set model.time_activation=geglu"),
    ({}, {"expert_width": [64, 64, 64]}, r"model.expert_width=\[64, 64, 64\] must be .*expert_width=\[128, 256, 256\]"),
    (
        {},
        {"time_experts": 0, "expert_width": [200, 300, 300]},
        r"model.expert_width=\[200, 300, 300\] must be .*\[128, 256, 256\]",
    ),
    ({}, {"time_experts": 0, "time_activation": "gelu"}, r"model.time_activation=gelu .* Set model.time_activation=geglu"),
    ({"norm_eps": 1e-6}, {}, r"norm_eps=1e-06 must be"),
    ({"mid_block_scale_factor": 2}, {}, r"mid_block_scale_factor=2 must be"),
    ({"resnet_out_scale_factor": 1.4}, {}, r"resnet_out_scale_factor=1.4 must be"),
    ({}, {"text_width": 24}, r"model.text_width=24 must be 12, the value in the configuration of the checkpoint"),
]


@pytest.mark.parametrize(("changes", "model", "message"), UNFIT)
def test_unet_that_does_not_fit_is_refused_by_field(tmp_path, changes, model, message):
    stable_diffusion(**changes).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=message):
        convert("auto", tmp_path / "unet", "canonical", tmp_path / "out", Options(prediction="epsilon"), target(**model))
    assert not (tmp_path / "out").exists()


def starting(config: Config, **run) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def test_new_run_starts_from_a_dense_folder_with_reinit(tmp_path):
    dense, config = stable_diffusion(), target()
    dense.save_pretrained(tmp_path / "unet")
    predicts(tmp_path, "epsilon")
    with pytest.raises(UserError, match=r"run.init_from=.* must fit the model.*set run.reinit=\[edge, space, time\]"):
        load_initial(plain_fragments(RaphaelUNet(config)), tmp_path / "unet", config)
    config = starting(config, reinit=("edge", "space", "time"))
    model = RaphaelUNet(config)
    summary = load_initial(plain_fragments(model), tmp_path / "unet", config).describe(tmp_path)
    assert "upcycled to experts" in summary
    assert "reinitialised: 110 (edge)" in summary
    assert "not loaded: 44 (time)" in summary
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    with torch.no_grad():
        ours = model(batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end, batch.gate_noise).prediction
        theirs = dense(batch.x0, batch.timestep, batch.text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_reinit_parts_are_reinitialised_and_all_else_is_loaded(tmp_path):
    """Fine-tuning without edge maps, and with captions of another width."""
    config = target()
    handmade_canonical(tmp_path / "before", config, state := random_state(config, ("master",)))
    other = config_from_tree({**TARGET, "model": {**TARGET["model"], "text_width": 20}, "edge": {"weight": 0.0}})
    for missing in ((), ("edge",), ("text",)):
        message = r"set run.reinit=\[(edge, )?(text)?"
        with pytest.raises(UserError, match=message):
            load_initial(plain_fragments(RaphaelUNet(other)), tmp_path / "before", starting(other, reinit=missing))
    config = starting(other, reinit=("edge", "text"))
    model, drawn = RaphaelUNet(config), RaphaelUNet(config)
    drawn.load_state_dict(model.state_dict())
    initial = load_initial(plain_fragments(model), tmp_path / "before", config)
    reinitialised = {n for n, _ in model.named_parameters() if "attn2.to_k." in n or "attn2.to_v." in n}
    reinitialised |= {n for n, _ in model.named_parameters() if n.startswith("text_gates.") and n.endswith("net.0.weight")}
    assert set(initial.reinitialised) == reinitialised
    assert {n.split(".edge.")[1].split(".")[0] for n in initial.unused if ".edge." in n} == {"net"}
    for (name, value), before in zip(model.named_parameters(), drawn.parameters(), strict=True):
        assert torch.equal(value, before if name in reinitialised else state["master", name]), name


def test_other_unet_width_is_refused_with_any_reinit(tmp_path):
    handmade_canonical(tmp_path / "before", target(), random_state(target(), ("master",)))
    config = starting(target(channels=[32, 64, 96]), reinit=("edge", "space", "time", "text"))
    with pytest.raises(UserError, match=r"must fit the model.* Only edge modules.* may differ"):
        load_initial(plain_fragments(RaphaelUNet(config)), tmp_path / "before", config)


def predicts(folder: Path, prediction: str) -> None:
    """Write a scheduler that states the prediction type."""
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))


@pytest.mark.parametrize("part", ["", "unet"])
def test_prediction_type_is_read_from_the_scheduler(tmp_path, part):
    """Stable Diffusion 2 predicts v, its base variant noise: the weights do not show it."""
    stable_diffusion().save_pretrained(tmp_path / "sd2/unet")
    predicts(tmp_path / "sd2", "v_prediction")
    (tmp_path / "sd2/model_index.json").write_text("{}")
    source = tmp_path / "sd2" / part
    assert open_checkpoint("auto", source).config.diffusion.prediction == "v_prediction"
    message = r"Set diffusion.prediction=v_prediction"
    with pytest.raises(UserError, match=f"diffusion.prediction=epsilon must be v_prediction, .* --from .*{message}"):
        convert("auto", source, "canonical", tmp_path / "out", Options(), target())
    dense = open_checkpoint("auto", source).config
    fragments = plain_fragments(RaphaelUNet(dense))
    epsilon = dense.model_copy(update={"diffusion": dense.diffusion.model_copy(update={"prediction": "epsilon"})})
    with pytest.raises(UserError, match=f"diffusion.prediction=epsilon .* run.init_from .*{message}"):
        load_initial(fragments, source, epsilon)
    load_initial(fragments, source, dense)
    with pytest.raises(UserError, match=r"--prediction epsilon must be v_prediction, the prediction type that"):
        convert("auto", source, "canonical", tmp_path / "out", Options(prediction="epsilon"))
    assert not (tmp_path / "out").exists()


def test_unknown_prediction_type_is_refused(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "unet")
    with pytest.raises(
        UserError, match=r"must state the prediction type with which the model was trained.*Add --prediction"
    ):
        convert("auto", tmp_path / "unet", "canonical", tmp_path / "out", Options())
    dense = open_checkpoint("auto", tmp_path / "unet").config
    fragments = plain_fragments(RaphaelUNet(dense))
    with pytest.raises(UserError, match=r"run.init_from=.* must state the prediction type .* with --prediction"):
        load_initial(fragments, tmp_path / "unet", dense)
    convert("auto", tmp_path / "unet", "canonical", tmp_path / "v", Options(prediction="v_prediction"))
    assert open_checkpoint("auto", tmp_path / "v").config.diffusion.prediction == "v_prediction"
    with pytest.raises(UserError, match=r"diffusion.prediction=epsilon must be v_prediction"):
        load_initial(fragments, tmp_path / "v", dense)
