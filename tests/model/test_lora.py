"""Adapters: results on any number of ranks, files that peft reads, and an unchanged base model."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_checkpoint
from raphael_dist.config.model_sections import Lora
from raphael_dist.config.schema import Config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.init_weights import adapted_base
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.lora_files import Adapter, MergedSource, adapter_of, read_adapter, read_lora_file, write_adapter
from raphael_dist.convert.write_plan import Options
from raphael_dist.errors import UserError
from raphael_dist.model.lora import add_lora, parse_adapter_name
from raphael_dist.model.moe import SPACE_BACKENDS
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelPipeline
from raphael_dist.sampling.load_model import read_model
from tests.lib.adapters import STEPS, canonical, hashes, losses_of, one_process, sample_image
from tests.lib.checkpoints import open_step
from tests.lib.forks import Forks, output_of
from tests.lib.launch import train_many
from tests.lib.synthetic import adapted_model, tiny_config
from tests.sampling.test_sampling import config_of

peft = pytest.importorskip("peft", reason="adapters need the package peft")

LORA = {"rank": 2, "alpha": 3}


def lora_config(**sections: dict[str, Any]) -> Config:
    arguments = {"lora": LORA, "run": {"init_from": "the base"}}
    return tiny_config(**{name: {**arguments.get(name, {}), **sections.get(name, {})} for name in arguments | sections})


def factors_of(model: RaphaelUNet) -> dict[str, dict[str, Tensor]]:
    """Return A and B by the name of their parameter."""
    actual: dict[str, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            target, factor = parse_adapter_name(name)  # type: ignore[misc]
            actual.setdefault(target, {})[factor] = p.detach()
    return actual


def merged_by_hand(model: RaphaelUNet, config: Config) -> RaphaelUNet:
    """Return a plain model whose weights are W + alpha / rank B A."""
    plain = RaphaelUNet(config)
    weights = {name.replace(".base_layer", ""): p.detach() for name, p in model.named_parameters()}
    factors, scale = factors_of(model), config.lora.alpha / config.lora.rank
    for name, p in plain.named_parameters():
        delta = scale * factors[name]["B"] @ factors[name]["A"] if name in factors else 0
        p.data = weights[name] + delta
    return plain


@pytest.mark.parametrize("backend", [*SPACE_BACKENDS, "reference"])
def test_an_adapted_model_computes_what_the_merged_one_does(backend: str) -> None:
    config = lora_config(model={"expert_backend": backend})
    model = adapted_model(config)
    merged, fresh = merged_by_hand(model, config), RaphaelUNet(config)
    actual, expected = losses_of(model, config), losses_of(merged, config)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual.sum().backward()
    expected.sum().backward()
    scale, whole = config.lora.alpha / config.lora.rank, dict(merged.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.requires_grad:  # of B A: by the chain rule from the merged weight's
            (target, factor), grad = parse_adapter_name(name), whole[parse_adapter_name(name)[0]].grad  # type: ignore[index, misc]
            both = factors_of(model)[target]
            by_hand = scale * (grad @ both["A"].mT if factor == "B" else both["B"].mT @ grad)
            assert (p.grad - by_hand).abs().max() < 1e-4 * by_hand.abs().max() + 1e-7, name
    assert len(factors_of(model)) == sum(n.endswith(("w1", "w2")) or (".attn" in n and "bias" not in n) for n in whole)
    before = losses_of(fresh, config)
    add_lora(fresh, config.lora, 0)
    assert torch.equal(losses_of(fresh, config), before), "new adapters must change nothing"


# ---- ranks ----------------------------------------------------------------------------------------------------------


# ZeRO stage, ep of both kinds, targets, recomputation
CASES = [(1, 2, ["attention", "experts"], "none"), (3, 1, ["attention", "experts"], "blocks")]
SLOW = [
    (0, 1, ["experts"], "blocks"),
    (2, 2, ["experts"], "blocks"),
    (2, 2, ["attention"], "none"),
    (3, 1, ["experts"], "all"),
]


@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["few", "more"])
def test_two_ranks_train_adapters_as_one_process_does(cases: list, tmp_path: Path) -> None:
    def sections(ep: int, targets: list[str], recompute: str) -> dict[str, dict[str, Any]]:
        return {
            "lora": {**LORA, "targets": targets},
            "run": {"init_from": "the base"},
            "train": {"global_batch_size": 7, "check_gradients": True},
            "optim": {"kind": "sgd", "max_grad_norm": 0.5},
            "model": {"checkpoint_activations": recompute},
            "parallel": {"space_ep": ep, "time_ep": ep, "placement": ["shard"] if ep > 1 else ["auto"]},
        }

    zero = [{"stage": stage, "stage3_param_persistence_threshold": 100} for stage, *_ in cases]
    specs = [
        {"sections": sections(*rest), "deepspeed": {"zero_optimization": tree}, "steps": STEPS}
        for (_, *rest), tree in zip(cases, zero, strict=True)
    ]
    for (_, ep, targets, _), actual in zip(cases, train_many(tmp_path, 2, specs), strict=True):
        weights, losses = one_process(tiny_config(**sections(1, targets, "none")))
        assert actual["losses"] == pytest.approx(losses, rel=1e-5)
        assert actual["weights"].keys() == weights.keys(), "adapters alone are trained"
        for name, value in weights.items():
            assert (actual["weights"][name] - value).abs().max() < 1e-4 * value.abs().max(), name
        assert bool(actual["spread"]) == (ep > 1)


# ---- runs -----------------------------------------------------------------------------------------------------------


def spec(base: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, dict[str, Any]] = {
        "lora": LORA,
        "run": {"init_from": str(base)},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 4, "log_every": 1},
        "optim": {"lr": 1e-2, "max_grad_norm": 0.5},
        "checkpoint": {"every": 2, "keep": 9},
        "ema": {"decay": 0.5},
    }
    return {"sections": {name: {**arguments.get(name, {}), **sections.get(name, {})} for name in arguments | sections}}


@pytest.fixture(scope="module")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train a base model, and adapters for it on two ranks with sharded experts."""
    folder = tmp_path_factory.mktemp("lora")
    base = canonical(folder / "base", tiny_config())
    before = hashes(base)
    forks.must(folder / "run", 2, stage=2, **spec(base, parallel={"space_ep": 2, "time_ep": 2, "placement": ["shard"]}))
    assert hashes(base) == before, "the base must stay as it is"
    return base, folder / "run"


@pytest.mark.slow
def test_adapter_run_resumes_bit_for_bit_on_other_ranks(forks: Forks, trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    whole = open_step(run, 4)
    assert whole.shapes == {n: tuple(p.shape) for n, p in adapted_model(lora_config()).named_parameters() if p.requires_grad}
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    forks.must(resumed, 2, stage=2, **spec(base, parallel={"space_ep": 2, "time_ep": 2, "placement": ["shard"]}))
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in whole.shapes:
            assert torch.equal(open_step(resumed, 4).whole(kind, name), whole.whole(kind, name)), f"{kind} of {name}"
    # One process under ZeRO-3 restores the same numbers.
    forks.must(resumed, 1, stage=3, save_again=True, **spec(base))
    for name in whole.shapes:
        assert torch.equal(open_step(resumed, 99).whole("exp_avg", name), whole.whole("exp_avg", name)), name
    # Adapters do not continue with another base model.
    other = canonical(tmp_path / "other", tiny_config(), seed=6)
    assert forks.run(resumed, 1, **spec(other)) == [2]
    assert "run.init_from must" in output_of(resumed, 1)
    assert "a base model with other weights" in output_of(resumed, 1)


def test_the_frozen_weights_are_the_bases_averaged_ones(trained: tuple[Path, Path]) -> None:
    base, _ = trained
    weights = open_checkpoint("auto", base)
    model, _ = adapted_base(lora_config(run={"init_from": str(base)}))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            plain = name.replace(".base_layer", "")
            assert torch.equal(p.detach().flatten(), weights.read("ema", plain, 0, p.numel()).flatten()), name


@pytest.mark.parametrize("target", ["peft", "controlnet"])
def test_export_without_a_run_names_its_option(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--from", "auto", str(tmp_path / "gone"), "--to", target, str(tmp_path / "out")]
    assert convert_checkpoint.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: --from auto {tmp_path / 'gone'} contains no checkpoint")


def test_peft_and_we_read_each_others_files(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    assert convert_checkpoint.main(["--from", "auto", str(run), "--to", "peft", str(tmp_path / "adapter")]) == 0
    config, checkpoint = tiny_config(), open_checkpoint("auto", base)

    def plain() -> RaphaelUNet:
        return read_model(checkpoint, config, "ema")

    def ours(folder: Path) -> Tensor:
        return losses_of(read_model(MergedSource(checkpoint, read_adapter(folder)), config, "ema"), config)

    actual = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "adapter"))
    torch.testing.assert_close(losses_of(actual.base_model.model, config), ours(tmp_path / "adapter"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(run), ours(tmp_path / "adapter"))
    assert not torch.allclose(ours(run), losses_of(plain(), config), rtol=1e-3), "the adapters must do something"
    # The other way, from peft's own idea of one of the two matrices, and of half of the attention.
    theirs = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["to_q"], target_parameters=["space_moe.w2"])
    actual = peft.get_peft_model(plain(), theirs)
    for name, p in actual.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    actual.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(losses_of(actual.base_model.model, config), ours(tmp_path / "theirs"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 0.5])
def test_tensors_of_another_rank_than_the_config_are_refused(factor: float, tmp_path: Path) -> None:
    targets = {"target_modules": ["to_q"], "target_parameters": ["space_moe.w2"]}
    actual = peft.get_peft_model(RaphaelUNet(tiny_config()), peft.LoraConfig(r=4, lora_alpha=4, **targets))
    actual.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": int(4 / factor)}))
    with pytest.raises(UserError, match=r"adapter_config.json"):
        MergedSource(canonical_base(tmp_path), read_adapter(tmp_path))
    # Of experts alone the shape of the model tells.
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "moe" in key}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"requires .*w2 with the shape|does not fit adapter_config.json"):
        MergedSource(canonical_base(tmp_path), read_adapter(tmp_path))


def canonical_base(folder: Path) -> Any:
    path = folder / "base"
    return open_checkpoint("auto", path if path.exists() else canonical(path, tiny_config()))


def test_deeply_nested_metadata_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 4)}, file, {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(UserError, match=r"^--lora: .*\.safetensors cannot be read: nested too deeply\. Copy"):
        read_lora_file(file, "--lora")


def test_merging_gives_a_whole_checkpoint_and_leaves_the_base_as_it_is(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    before = hashes(base)
    convert("auto", base, "raphael", tmp_path / "merged", Options(world=3), lora=run, lora_scale=0.5)
    assert hashes(base) == before
    adapter = read_adapter(run)
    with open_checkpoint("auto", tmp_path / "merged") as merged, open_checkpoint("auto", base) as plain:
        assert merged.config.lora.rank == 0
        for name, shape in plain.shapes.items():
            numel = torch.Size(shape).numel()
            was, now = plain.read("ema", name, 0, numel), merged.read("ema", name, 0, numel)
            expected = was + 0.5 * adapter.delta(name).flatten() if name in adapter.factors else was
            assert torch.equal(now.flatten(), expected.flatten()), name


def test_adapters_are_used_by_the_command_and_by_the_pipeline(tmp_path: Path) -> None:
    config = config_of()
    base = canonical(tmp_path / "base", config)
    tuned = config.model_copy(update={"lora": Lora(**LORA)})
    factors = factors_of(adapted_model(tuned))
    adapter = Adapter(base, 1.5, {name: (both["A"], both["B"]) for name, both in factors.items()})
    write_adapter(adapter, tuned.lora, str(base), tmp_path / "adapter")

    drawn = partial(sample_image, base, tmp_path)
    before = hashes(base)
    plain, tuned_picture = drawn("plain"), drawn("tuned", "--lora", str(tmp_path / "adapter"))
    none = drawn("none", "--lora", str(tmp_path / "adapter"), "--lora-scale", "0")
    assert hashes(base) == before
    assert (none == plain).all()
    assert abs(tuned_picture - plain).max() > 2
    convert("auto", base, "diffusers", tmp_path / "exported", Options())
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="blue")
    pipeline.set_adapters("blue", 0.3)
    pipeline.set_adapters("blue")
    actual = np.asarray(pipeline("a", seed=0).images[0]).astype(int)
    assert abs(actual - tuned_picture).max() <= 1
    pipeline.unload_lora_weights()
    assert (np.asarray(pipeline("a", seed=0).images[0]) == plain).all()


def test_mistakes_are_one_line(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    for arguments, message in (
        ({"lora": LORA}, "lora.rank=2 requires run.init_from"),
        ({"lora": LORA, "run": {"init_from": "x", "reinit": ["edge"]}}, r"run.reinit=\['edge'\] requires lora.rank=0"),
        (
            {"lora": LORA, "run": {"init_from": "x"}, "model": {"space_experts": 0, "time_experts": 0}},
            "but model.space_experts and model.time_experts are 0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(**arguments)
    with pytest.raises(UserError, match=r"contains only adapters, without the base model.*--lora .*--to peft"):
        open_checkpoint("auto", run)
    with pytest.raises(UserError, match=r"--lora .*no checkpoint.*adapter_config.json"):
        read_adapter(base)
    other = canonical(tmp_path / "wider", tiny_config(model={"expert_width": [24, 28]}))
    with pytest.raises(UserError, match=r"requires .* but its shape in the model is .* base model"):
        MergedSource(open_checkpoint("auto", other), read_adapter(run))
    convert_checkpoint.main(["--from", "auto", str(run), "--to", "peft", str(tmp_path / "adapter")])
    with pytest.raises(UserError, match="exists already"):
        write_adapter(adapter_of(open_step(run, 4)), Lora(**LORA), "", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match=r"use_dora=True in adapter_config.json.*plain LoRA"):
        read_adapter(tmp_path / "adapter")
