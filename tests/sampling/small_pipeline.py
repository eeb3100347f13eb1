"""A small pipeline with random weights, which tests call."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

from raphael_dist.convert.layouts.diffusers import expert_json
from raphael_dist.convert.lora_files import Adapter
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.pipeline import RaphaelPipeline, RaphaelUNet2D
from tests.lib.parts import save_text
from tests.sampling.test_pipeline import emoji

PROMPTS = ["a cat", "dog"]


def make_parts(folder: Path) -> dict[str, Any]:
    """Return the components; `folder` gets the files of the text encoder."""
    save_text(folder, "CLIP L")
    config = emoji(text_width=32)
    torch.manual_seed(0)
    return {
        "unet": RaphaelUNet2D.from_config({**expert_json(config, RaphaelUNet2D), "sample_size": 8}),
        "vae": AutoencoderKL.from_pretrained("data/vae-emoji"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": make_scheduler(config.diffusion, "ddim"),
    }


def build(parts: dict[str, Any], kind: Any = RaphaelPipeline, **other: Any) -> Any:
    pipeline = kind(**parts | other, max_tokens=12, steps=3, guidance=3.0, size=[32, 32])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_from(folder: Path, **options: Any) -> Any:
    pipeline = RaphaelPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: Any = "a cat", **arguments: Any) -> np.ndarray:
    return pipeline(prompt, **{"seed": 1, "output_type": "np", **arguments}).images


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def make_adapter(unet: Any, seed: int = 0) -> Adapter:
    """Return random adapters of attention and of experts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in unet.named_parameters() if name.endswith(("attn1.to_q.weight", "space_moe.w1"))}
    factors = {
        name: tuple(torch.randn(*s, generator=generator) for s in ((*shape[:-2], 2, shape[-1]), (*shape[:-1], 2)))
        for name, shape in shapes.items()
    }
    return Adapter(Path("blue"), 0.5, factors)


def copy_of(pipeline: Any) -> Any:
    """Return the same pipeline with a copy of its U-Net."""
    other = RaphaelPipeline.from_pipe(pipeline, unet=copy.deepcopy(pipeline.unet))
    other.set_progress_bar_config(disable=True)
    return other
