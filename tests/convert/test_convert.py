"""Conversions: every layout to every other and back, bit for bit."""

import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import names, open_checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from tests.lib.checkpoints import (
    KINDS,
    WHOLE,
    assert_same,
    handmade_canonical,
    in_manifest,
    options,
    random_state,
    read_state,
)
from tests.lib.synthetic import TREE, tiny_config

# (ranks, space_ep, time_ep, ZeRO): all that is allowed on 1, 2, 4 and 6 ranks, of which some run each time.
QUICK = [(1, 1, 1, 0), (2, 1, 1, 1), (2, 1, 1, 3), (4, 2, 4, 1), (6, 3, 2, 2)]
TOPOLOGIES = [
    *[(world, 1, 1, stage) for world in (1, 2, 4, 6) for stage in (0, 1, 2, 3)],
    *[(world, space, time, stage)
      for world in (2, 4, 6) for space in (1, 2, 3, 6) for time in (1, 2, 4) for stage in (1, 2)
      if world % space == 0 and world % time == 0 and (space, time) != (1, 1)],
]  # fmt: skip
TOPOLOGIES = [pytest.param(t, id=str(t), marks=() if t in QUICK else pytest.mark.slow) for t in TOPOLOGIES]


def weights(state, kind="master"):
    return {("master", name): value for (k, name), value in state.items() if k == kind}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_state_survives_every_topology_in_both_layouts_of_ranks(tmp_path, sources, topology):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "raphael", tmp_path / "run", options("raphael", topology))
    assert_same(read_state("auto", tmp_path / "run"), state)
    convert("auto", tmp_path / "run", "deepspeed", tmp_path / "ds", options("deepspeed", topology))
    checkpoint = open_checkpoint("auto", tmp_path / "ds")
    assert (checkpoint.progress, checkpoint.dataset) == (Progress(7, 84, 5, {"skipped": 2}), "synthetic")
    assert_same(read_state("auto", tmp_path / "ds"), state)
    convert("auto", tmp_path / "ds", "canonical", tmp_path / "back", Options(part_bytes=300_000))
    assert len(list((tmp_path / "back").glob("model-*"))) > 2
    manifest = json.loads((tmp_path / "back/manifest.json").read_text())
    assert (manifest["step"], manifest["updates"], manifest["guard"]) == (7, 5, {"skipped": 2})
    assert_same(read_state("auto", tmp_path / "back"), state)


@pytest.mark.parametrize("placement", [["replicate", "shard"], ["shard", "replicate"], ["auto"]])
def test_replicated_levels_survive_conversion(tmp_path, placement):
    config = tiny_config(parallel={"placement": placement})
    state = random_state(config)
    handmade_canonical(tmp_path / "canonical", config, state)
    for stage, layout in ((1, "raphael"), (2, "deepspeed")):
        convert("canonical", tmp_path / "canonical", layout, tmp_path / layout, options(layout, (4, 2, 4, stage)))
        assert_same(read_state("auto", tmp_path / layout), state)


# Each pair once, since it is tested in both directions; a layout that holds everything before one of weights.
PAIRS = [
    (model, a, b)
    for model, cannot in (("moe", "dense"), ("dense", "megablocks"))
    for a, b in combinations(sorted(names(), key=lambda name: name not in WHOLE), 2)
    if cannot not in (a, b) and (model == "moe" or "dense" in (a, b))
]


@pytest.mark.parametrize(("model", "a", "b"), PAIRS)
def test_every_pair_of_layouts_converts_and_back_bit_for_bit(tmp_path, sources, model, a, b):
    state, canonical = sources[model]
    convert("canonical", canonical, a, tmp_path / "a", options(a))
    before = read_state(a, tmp_path / "a")
    assert_same(before, state if a in WHOLE else weights(state))
    report = convert(a, tmp_path / "a", b, tmp_path / "b", options(b, (4, 1, 1, 1)))
    convert(b, tmp_path / "b", a, tmp_path / "again", options(a, (3, 1, 1, 2)))
    after = read_state(a, tmp_path / "again")
    if {a, b} <= WHOLE:
        assert_same(after, state)
        return
    # A layout of weights leaves the moments out, with a note; a run without them starts with zeros.
    assert_same(weights(after), weights(state))
    assert a not in WHOLE or any("not written" in note for note in report.notes)
    assert all(not value.any() for (kind, _), value in after.items() if kind in MOMENTS)


def test_trainer_reads_a_converted_run(tmp_path, sources):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "raphael", tmp_path / "run", options("raphael", (4, 2, 4, 2)))
    reader = open_newest(tmp_path / "run")
    assert (reader.step, reader.integrity_error(), reader.kinds()) == (7, None, set(KINDS))
    assert reader.config().parallel.space_ep == 2
    for (kind, name), value in state.items():
        assert torch.equal(reader.whole(kind, name), value)


def test_run_from_weights_only_starts_at_step_0_with_zero_moments(tmp_path, sources):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "megablocks", tmp_path / "mb", options("megablocks", weights="ema"))
    report = convert("megablocks", tmp_path / "mb", "raphael", tmp_path / "run", options("raphael"))
    assert "starts at step 0 with zeros" in report.notes[0]
    reader = CheckpointReader(tmp_path / "run/checkpoints/step-00000000")
    name = next(iter(reader.shapes))
    assert torch.equal(reader.whole("master", name), state["ema", name])
    assert not reader.whole("exp_avg", name).any()


def test_megablocks_matrices_compute_the_same_as_the_experts(tmp_path, sources):
    """x @ w1^T, activation, @ w2, with rows sorted by expert, as its grouped product takes them."""
    state, canonical = sources["moe"]
    convert("canonical", canonical, "megablocks", tmp_path / "mb", options("megablocks"))
    stored = load_file(tmp_path / "mb/model.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe"
    w1, w2 = (state["master", f"{layer}.w{i}"] for i in (1, 2))
    experts, width, dim = w1.shape
    assert stored[f"{layer}.experts.mlp.w1"].shape == stored[f"{layer}.experts.mlp.w2"].shape == (experts * width, dim)
    x = torch.randn(5, dim)
    for k in range(experts):
        rows = slice(k * width, (k + 1) * width)
        theirs = torch.relu(x @ stored[f"{layer}.experts.mlp.w1"][rows].t()) @ stored[f"{layer}.experts.mlp.w2"][rows]
        torch.testing.assert_close(theirs, torch.relu(x @ w1[k].t()) @ w2[k].t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_megablocks_module_loads_the_matrices(tmp_path):
    layers = pytest.importorskip("megablocks.layers.mlp")
    arguments = pytest.importorskip("megablocks.layers.arguments")
    config = tiny_config(model={**TREE["model"], "channels": [64, 64], "head_dim": 16, "expert_width": [128, 128]})
    state = random_state(config, ("master",))
    handmade_canonical(tmp_path / "canonical", config, state)
    convert("canonical", tmp_path / "canonical", "megablocks", tmp_path / "mb", options("megablocks", dtype=torch.bfloat16))
    stored = load_file(tmp_path / "mb/model.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe"
    module = layers.GroupedMLP(
        arguments.Arguments(
            hidden_size=64, ffn_hidden_size=128, moe_num_experts=6, mlp_impl="grouped", fp16=False, bf16=True
        )
    )
    module.load_state_dict({f"w{i}": stored[f"{layer}.experts.mlp.w{i}"] for i in (1, 2)})
    x, counts = torch.randn(18, 64).bfloat16(), torch.tensor([3, 0, 5, 4, 2, 4])
    outputs = module.cuda()(x.cuda(), counts).float().cpu()
    w1, w2 = (state["master", f"{layer}.w{i}"].bfloat16().float() for i in (1, 2))
    gelu = torch.nn.GELU("tanh")
    rows = [gelu(r.float() @ w1[k].t()) @ w2[k].t() for k, r in enumerate(x.split(counts.tolist()))]
    torch.testing.assert_close(outputs, torch.cat(rows), rtol=3e-2, atol=3e-2 * float(outputs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_given_dtype(tmp_path, sources, dtype):
    state, canonical = sources["dense"]
    convert("canonical", canonical, "dense", tmp_path / "unet", options("dense", dtype=dtype))
    rounded = {key: value.to(dtype).float() for key, value in weights(state).items()}
    assert_same(read_state("auto", tmp_path / "unet"), rounded)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_run_without_moments_keeps_its_step(tmp_path, optimizer):
    config = tiny_config(optim={"kind": optimizer})
    folder = handmade_canonical(tmp_path / "canonical", config, random_state(config, ("master", "ema")))
    updates = 5 if optimizer == "sgd" else 0  # AdamW before its first update
    in_manifest(folder, updates=updates)
    convert("auto", folder, "deepspeed", tmp_path / "ds", options("deepspeed"))
    convert("auto", tmp_path / "ds", "raphael", tmp_path / "run", options("raphael", (4, 2, 2, 1)))
    for path in (tmp_path / "ds", tmp_path / "run"):
        assert open_checkpoint("auto", path).progress == Progress(7, 84, updates, {"skipped": 2})
    weights = convert("auto", folder, "megablocks", tmp_path / "weights", Options())
    assert "here ema" in weights.notes[0]
    convert("auto", tmp_path / "weights", "raphael", tmp_path / "new", options("raphael"))
    assert open_checkpoint("auto", tmp_path / "new").progress.step == 0, "weights alone are no run"


def test_model_is_upcycled_from_any_layout_once(tmp_path, sources):
    config = tiny_config(model={**TREE["model"], "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]})
    report = convert("auto", sources["dense"][1], "canonical", tmp_path / "out", Options(), config)
    assert open_checkpoint("auto", tmp_path / "out").config.model.space_experts == config.model.space_experts
    assert report.rows[0].kind == "master"
    with pytest.raises(
        UserError, match=r"--config requires a dense model, .* already has experts or edge modules. Leave out --config"
    ):
        convert("auto", tmp_path / "out", "canonical", tmp_path / "again", Options(), config)
