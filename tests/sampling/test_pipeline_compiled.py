"""A pipeline whose U-Net was passed to `torch.compile` works as one whose U-Net was not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from tests.sampling.small_pipeline import build, build_from, copy_of, draw, make_adapter


def compiled(pipeline: Any) -> Any:
    other = copy_of(pipeline)
    other.unet = torch.compile(other.unet, backend="eager")
    return other


def test_compiled_dense_unet_draws_the_same_image(parts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
    }
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=32, attention_head_dim=4, **blocks)
    pipeline = build(parts, unet=unet)
    expected = draw(pipeline)
    # The texts have padding, whose mask this U-Net does not expect.
    np.testing.assert_allclose(draw(compiled(pipeline)), expected, atol=1e-4)


def test_compiled_unet_is_saved_with_its_code(pipeline: Any, tmp_path: Path) -> None:
    compiled(pipeline).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["modeling_raphael", "RaphaelUNet2D"]
    assert (tmp_path / "unet" / "modeling_raphael.py").is_file()
    assert np.array_equal(draw(build_from(tmp_path)), draw(pipeline))


def test_compiled_unet_gets_adapters(pipeline: Any) -> None:
    other = compiled(pipeline)
    adapter = make_adapter(pipeline.unet)
    layers = {}
    for name, pair in adapter.factors.items():
        if name.endswith("to_q.weight"):
            layers |= {name.replace("weight", f"lora_{m}.weight"): v for m, v in zip("AB", pair, strict=True)}
    other.load_lora_weights(layers, adapter_name="blue")
    changed, name = dict(other.unet._orig_mod.named_parameters()), next(iter(layers)).replace("lora_A.", "")
    own = dict(pipeline.unet.named_parameters())[name]
    assert not torch.equal(changed[name], own)
    other.unload_lora_weights()
    assert torch.equal(changed[name], own)
