"""LoRA adapters of a pipeline, under diffusers' method names."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from raphael_dist.errors import UserError
from raphael_dist.pipeline import RaphaelImg2ImgPipeline, RaphaelPipeline
from tests.sampling.small_pipeline import build, build_from, copy_of, draw, make_adapter


def weights_of(pipeline: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}


def assert_same(pipeline: Any, expected: dict[str, Tensor]) -> None:
    for name, p in pipeline.unet.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_adapters_are_combined_fused_and_removed_exactly(parts: dict[str, Any], tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    pipeline = build_from(tmp_path / "saved")
    own = weights_of(pipeline)
    a, b = make_adapter(pipeline.unet), make_adapter(pipeline.unet, 1)
    pipeline._lora.adapters |= {"a": a, "b": b}

    def expected(weights: dict[str, float]) -> dict[str, Tensor]:
        sums = {name: value.clone() for name, value in own.items()}
        for key, weight in weights.items():
            for name in a.factors:
                sums[name] += weight * {"a": a, "b": b}[key].delta(name)
        return sums

    def assert_weights(weights: dict[str, Tensor]) -> None:
        assert_same(pipeline, weights)

    pipeline.set_adapters(["a", "b"], [0.3, 0.7])
    assert pipeline.get_active_adapters() == ["a", "b"]
    assert_weights(expected({"a": 0.3, "b": 0.7}))
    assert RaphaelImg2ImgPipeline.from_pipe(pipeline).get_active_adapters() == ["a", "b"]
    pipeline.set_adapters("b")
    assert_weights(expected({"b": 1.0}))
    pipeline.delete_adapters("a")
    assert pipeline.get_list_adapters() == {"unet": ["b"]}
    pipeline.fuse_lora(lora_scale=0.5)
    assert_weights(expected({"b": 0.5}))
    pipeline.unload_lora_weights()  # fused weights stay
    assert_weights(expected({"b": 0.5}))
    pipeline.unfuse_lora()
    assert_weights(own)
    with pytest.raises(UserError, match="adapter_names='c' must be a loaded adapter"):
        pipeline.set_adapters("c")
    with pytest.raises(UserError, match="load_lora_weights"):
        pipeline.load_lora_weights(tmp_path)


@pytest.fixture
def adapted(pipeline: Any) -> Any:
    """A pipeline with the adapters a and b, of which none is active."""
    other = copy_of(pipeline)
    other._lora.adapters |= {"a": make_adapter(other.unet), "b": make_adapter(other.unet, 1)}
    return other


def test_adapters_are_disabled_and_enabled(adapted: Any) -> None:
    own = weights_of(adapted)
    adapted.set_adapters(["a", "b"], [{"unet": -0.5}, None])
    both = weights_of(adapted)
    adapted.disable_lora()
    assert_same(adapted, own)
    assert adapted.get_active_adapters() == ["a", "b"]
    adapted.enable_lora()
    assert_same(adapted, both)
    adapted.disable_lora()
    adapted.delete_adapters("b")
    assert_same(adapted, own)
    adapted.enable_lora()
    by_name = weights_of(adapted)
    adapted.set_adapters("a", -0.5)
    assert_same(adapted, by_name)


def test_fused_adapters_are_active_again_after_unfuse(adapted: Any) -> None:
    own = weights_of(adapted)
    adapted.set_adapters(["a", "b"], [0.5, 2.0])
    both = weights_of(adapted)
    adapted.fuse_lora(components=["unet"], lora_scale=1.0, adapter_names=["a"])
    assert (adapted.get_active_adapters(), adapted.get_list_adapters()) == (["b"], {"unet": ["b"]})
    for name, value in weights_of(adapted).items():
        torch.testing.assert_close(value, both[name])
    with pytest.raises(UserError, match="adapter_name='a' must be new"):
        adapted.load_lora_weights({"x": torch.zeros(1)}, adapter_name="a")
    adapted.unfuse_lora(components=["unet"])
    assert sorted(adapted.get_active_adapters()) == ["a", "b"]
    adapted.set_adapters(["a", "b"], [0.5, 2.0])
    assert_same(adapted, both)
    adapted.unload_lora_weights()
    assert_same(adapted, own)


def test_files_of_diffusers_and_peft_are_loaded_by_their_names(pipeline: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need the package peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q"], target_parameters=["space_moe.w1", "space_moe.w2"])
    theirs = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    layers = peft.get_peft_model_state_dict(theirs)
    save = {"unet_lora_layers": layers, "unet_lora_adapter_metadata": config.to_dict()}
    RaphaelPipeline.save_lora_weights(tmp_path / "all", **save)
    RaphaelPipeline.save_lora_weights(tmp_path / "all" / "sub", weight_name="blue.safetensors", **save)
    theirs.save_pretrained(str(tmp_path / "all" / "peft"))
    expected = draw(RaphaelPipeline.from_pipe(pipeline, unet=theirs.merge_and_unload()))
    assert not np.allclose(expected, draw(pipeline), atol=1e-2)
    file = tmp_path / "all" / "pytorch_lora_weights.safetensors"
    sub = {"subfolder": "sub", "weight_name": "blue.safetensors"}
    for path, options in ((file.parent, {}), (file, {}), (file.parent, sub), (file.parent, {"subfolder": "peft"})):
        other = copy_of(pipeline)
        other.load_lora_weights(path, adapter_name="blue", local_files_only=True, **options)
        np.testing.assert_allclose(draw(other), expected, atol=1e-3)
        assert other.get_active_adapters() == ["blue"]

    # Without a configuration, as diffusers' training scripts save: attention only, alpha is the rank.
    attention = {name: value for name, value in layers.items() if "to_q" in name}
    RaphaelPipeline.save_lora_weights(tmp_path / "old", convert_state_dict_to_diffusers(attention))
    other, same = copy_of(pipeline), copy_of(pipeline)
    other.load_lora_weights(tmp_path / "old")
    assert other.get_active_adapters() == ["default_0"]
    same.load_lora_weights(attention)
    assert np.array_equal(draw(other), draw(same))
    other.load_lora_weights({name: 2 * value for name, value in attention.items()}, "default_0", hotswap=True)
    assert not np.array_equal(draw(other), draw(same))
    other.load_lora_weights(attention)
    other.delete_adapters("default_0")
    other.load_lora_weights(attention)
    assert other.get_list_adapters() == {"unet": ["default_1", "default_0"]}


def test_argument_that_cannot_work_is_named(adapted: Any, tmp_path: Path) -> None:
    layers, broken = {"x.lora_A.weight": torch.zeros(1, 2)}, copy.deepcopy(adapted._lora.adapters["a"])
    next(iter(broken.factors.values()))[0].fill_(float("nan"))
    adapted._lora.adapters["broken"] = broken
    load, save, fuse, choose = adapted.load_lora_weights, adapted.save_lora_weights, adapted.fuse_lora, adapted.set_adapters
    for call, message in (
        (lambda: load(tmp_path, revision="main"), "revision='main' is not supported"),
        (lambda: load(tmp_path, hotswap=True), "hotswap=True requires a loaded adapter"),
        (lambda: load(tmp_path, weight_name="x.safetensors"), "x.safetensors cannot be read as a safetensors file"),
        (lambda: load(layers), r"the adapter of x in the tensors must have one matrix A"),
        (lambda: save(tmp_path), "unet_lora_layers must be the tensors"),
        (lambda: save(tmp_path, layers, text_encoder_lora_layers=layers), "text_encoder_lora_layers is not supported"),
        (lambda: save(tmp_path, layers, safe_serialization=False), "safe_serialization=False is not supported"),
        (lambda: fuse(["unet", "text_encoder"]), r"components=\['unet', 'text_encoder'\] must be \['unet'\]"),
        (lambda: adapted.unfuse_lora(components=[]), r"components=\[\] must be \['unet'\]"),
        (lambda: fuse(adapter_names="c"), "adapter_names='c' must be a loaded adapter"),
        (lambda: fuse(lora_scale="x"), "lora_scale='x' must be a finite number"),
        (lambda: fuse(safe_fusing=True, adapter_names="broken"), "safe_fusing=True requires finite adapters, but 'broken'"),
        (lambda: choose("a", {"unet": {"down": 1.0}}), "adapter_weights=.*'down'.* must be a finite number"),
        (lambda: choose("a", float("inf")), "adapter_weights=inf must be a finite number"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert adapted.get_active_adapters() == []
