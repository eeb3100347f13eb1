"""Every pipeline with image inputs takes the arguments of RaphaelPipeline, and images of each kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raphael_dist.convert.layouts.diffusers import expert_json
from raphael_dist.errors import UserError
from raphael_dist.pipeline import (
    RaphaelControlNet,
    RaphaelControlNetPipeline,
    RaphaelImg2ImgPipeline,
    RaphaelInpaintPipeline,
    RaphaelUNet2D,
    RaphaelUpscalePipeline,
)
from tests.sampling.small_pipeline import PROMPTS, build, draw, picture
from tests.sampling.test_pipeline import emoji


def left_half() -> Image.Image:
    return Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, axis=0).astype(np.uint8))


def build_variant(parts: dict[str, Any], kind: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of this class and the arguments of its images."""
    images: dict[str, Any] = {"image": picture(1)}
    if kind is RaphaelInpaintPipeline:
        images["mask_image"] = left_half()
    if kind is RaphaelControlNetPipeline:
        torch.manual_seed(1)
        control = RaphaelControlNet.from_config(expert_json(emoji(text_width=32), RaphaelControlNet))
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):  # they start at zero
            torch.nn.init.normal_(block.weight, std=0.3)
        return build(parts, kind, controlnet=control), images
    if kind is RaphaelUpscalePipeline:
        torch.manual_seed(1)
        fields = expert_json(emoji(text_width=32), RaphaelUNet2D)
        unet = RaphaelUNet2D.from_config({**fields, "sample_size": 8, "in_channels": 4 + 3 * 2 * 2})
        upscale = {"factor": 2, "patch": 2, "noise": 0.0, "back_projections": 1}
        return build(parts, kind, unet=unet, upscale=upscale), {"image": picture(1, 16)}
    return build(parts, kind), images


@pytest.mark.parametrize(
    "kind", [RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelControlNetPipeline, RaphaelUpscalePipeline]
)
def test_variant_takes_the_arguments_of_every_call(parts: dict[str, Any], kind: Any) -> None:
    pipeline, images = build_variant(parts, kind)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    together = draw(pipeline, PROMPTS, num_images_per_prompt=2, generator=generators, **images)
    assert together.shape == (4, 32, 32, 3)
    alone = draw(pipeline, PROMPTS[1], generator=torch.Generator().manual_seed(2), **images)
    np.testing.assert_allclose(together[2], alone[0], atol=1e-3)

    expected = draw(pipeline, **images)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoded = dict(zip(names, pipeline.encode_prompt("a cat"), strict=True))
    assert np.array_equal(draw(pipeline, None, **encoded, **images), expected)
    as_tuple = pipeline("a cat", seed=1, output_type="np", return_dict=False, **images)
    assert np.array_equal(as_tuple[0], expected)


@pytest.mark.parametrize("kind", [RaphaelImg2ImgPipeline, RaphaelInpaintPipeline])
def test_variant_is_saved_and_loaded(parts: dict[str, Any], tmp_path: Path, kind: Any) -> None:
    pipeline, images = build_variant(parts, kind)
    pipeline.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert np.array_equal(draw(loaded, **images), draw(pipeline, **images))


def test_callback_changes_latents_of_inpainting(parts: dict[str, Any]) -> None:
    pipeline, images = build_variant(parts, RaphaelInpaintPipeline)

    def erase(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

    def latents(**arguments: Any) -> Tensor:
        return pipeline("a cat", seed=1, output_type="latent", **images, **arguments).images

    changed, plain = latents(callback_on_step_end=erase), latents()
    assert not torch.equal(changed[..., :4], plain[..., :4])
    assert torch.equal(changed[..., 4:], plain[..., 4:])  # the rest is replaced after the next step


@pytest.mark.parametrize(
    "kind", [RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelControlNetPipeline, RaphaelUpscalePipeline]
)
def test_arrays_and_tensors_are_images(parts: dict[str, Any], kind: Any) -> None:
    pipeline, images = build_variant(parts, kind)
    expected = draw(pipeline, PROMPTS, **images)
    arrays = {name: np.asarray(image, np.float32) / 255 for name, image in images.items()}
    tensors = {n: torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1) for n, array in arrays.items()}
    for values in (arrays, tensors):
        assert np.array_equal(draw(pipeline, PROMPTS, **values), expected)
    arrays = {name: array.reshape(1, *array.shape[:2], -1).repeat(2, axis=0) for name, array in arrays.items()}
    assert np.array_equal(draw(pipeline, PROMPTS, **arrays), expected)
    tensors = {name: torch.stack([tensor] * 2) for name, tensor in tensors.items()}
    assert np.array_equal(draw(pipeline, PROMPTS, **tensors), expected)
    as_lists = {name: list(tensor) for name, tensor in tensors.items()}
    assert np.array_equal(draw(pipeline, PROMPTS, **as_lists), expected)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.full((32, 32, 3), 1.5),
        np.full((32, 32, 3), np.nan),
        np.zeros((3, 32, 32)),
        torch.zeros(32, 32, 3),
        torch.zeros(1, 4, 8, 8),
        np.zeros(()),
    ],
)
def test_array_that_is_no_image_is_reported_in_one_line(pipeline: Any, image: Any) -> None:
    changing = RaphaelImg2ImgPipeline.from_pipe(pipeline)
    with pytest.raises(UserError, match=r"image must be .*0\.\.1") as error:
        changing("a cat", image=image)
    assert "\n" not in str(error.value)
