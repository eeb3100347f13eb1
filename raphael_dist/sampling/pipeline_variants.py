"""Pipelines with image inputs: image-to-image, inpainting, ControlNet, super-resolution.

Each of these pipelines can share the components of a RaphaelPipeline: `RaphaelInpaintPipeline.from_pipe(pipeline)`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.data.buckets import fit
from raphael_dist.data.features.encoder_files import Model, Tokenizer
from raphael_dist.data.image import to_rgb
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseScheduler
from raphael_dist.sampling.pipeline import Output, RaphaelPipeline
from raphael_dist.sampling.pipeline_arguments import CallArguments, Images, Texts
from raphael_dist.sampling.pipeline_denoising import ImageInputs
from raphael_dist.sampling.sampler import check_small, to_tensor
from raphael_dist.text import JsonObject


def shows_options(call: Any) -> Any:
    """Decorate a pipeline's method `__call__`, so that its signature lists RaphaelPipeline's arguments, not `**options`.

    The signature is for help(), editors and diffusers, which read it. Returns `call` itself; calling it works as before.
    """
    *own, _ = inspect.signature(call).parameters.values()
    names = {parameter.name for parameter in own}
    options = [p for p in inspect.signature(RaphaelPipeline.__call__).parameters.values() if p.name not in names]
    call.__signature__ = inspect.Signature([*own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options)])
    return call


class RaphaelImg2ImgPipeline(RaphaelPipeline):
    """A pipeline for image-to-image: changes images according to a caption."""

    @shows_options
    def __call__(self, prompt: Texts = None, image: Images = None, strength: float = 0.8, **options: Any) -> Output:
        """Draw images that start from the images `image` and follow captions.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. It is resized and cropped to height x width.
            strength: share of the denoising steps, 0 to 1, that are applied to the image. 0 returns the image, 1 starts from
                almost pure noise.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, strength=strength, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        return ImageInputs(start=self._encode_images(call, [to_rgb(image) for image in call.images]))


class RaphaelInpaintPipeline(RaphaelPipeline):
    """A pipeline for inpainting: replaces a part of an image.

    After each step, the latents outside the mask are replaced by the noised latents of the image. The U-Net is
    trained without an input channel for the mask, so the U-Net does not know where the mask is.
    """

    @shows_options
    def __call__(
        self, prompt: Texts = None, image: Images = None, mask_image: Images = None, strength: float = 1.0, **options: Any
    ) -> Output:
        """Draw the part of an image that is white in a mask, and keep the rest.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. It is resized and cropped to height x width.
            mask_image: a mask of the size of the image, in one of the forms of `image`. Arrays and tensors may also be
                [H, W]. White (1): the image is drawn here. Black (0) or transparent: the image is kept.
            strength: share of the denoising steps, 0 to 1, that are applied to the image. 1: the masked part starts from
                pure noise.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, mask_image=mask_image, strength=strength, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        if not call.masks:
            raise UserError("mask_image=None must be a PIL image, white where the image is repainted. Pass a mask.")
        images, masks = [to_rgb(image) for image in call.images], [to_rgb(mask, "black") for mask in call.masks]
        for image, area in zip(images, masks, strict=False):  # `_encode_images` reports that there are no images
            if image.size != area.size:
                raise UserError(
                    f"mask_image of {area.width} x {area.height} pixels must have the size of the image, which is "
                    f"{image.width} x {image.height}. Resize the mask."
                )
        start, copies = self._encode_images(call, images), call.num_images_per_prompt
        fitted = [fit(mask.convert("L"), call.size_hw, False, Image.Resampling.NEAREST) for mask in masks]
        drawn_B1HW = torch.from_numpy(np.stack([np.asarray(mask) >= 128 for mask in fitted])).unsqueeze(1).float()
        mask = F.interpolate(drawn_B1HW, start.shape[-2:]).repeat_interleave(copies, dim=0)
        return ImageInputs(start=start, mask=mask.to(start.device))


class RaphaelControlNetPipeline(RaphaelPipeline):
    """A pipeline that draws images which follow an edge map, with a ControlNet."""

    model_cpu_offload_seq = "text_encoder->controlnet->unet->vae"

    def __init__(
        self,
        unet: Model,
        scheduler: NoiseScheduler,
        controlnet: Model,
        vae: Model = None,
        text_encoder: Model = None,
        tokenizer: Tokenizer = None,
        max_tokens: int = 77,
        steps: int = 25,
        guidance: float = 4.5,
        size: tuple[int, int] | list[int] = (512, 512),
        text: str | None = None,
        upscale: JsonObject | None = None,
    ) -> None:
        """Build the pipeline from `controlnet`, a RaphaelControlNet, and the components and settings of RaphaelPipeline."""
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, max_tokens, steps, guidance, size, text, upscale)
        self.register_modules(controlnet=controlnet)

    @shows_options
    def __call__(
        self, prompt: Texts = None, image: Images = None, controlnet_conditioning_scale: float = 1.0, **options: Any
    ) -> Output:
        """Draw images that follow an edge map.

        Args:
            prompt: one caption or several.
            image: edge map with white lines on black: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor
                [3, H, W], or a list with one of these for each prompt. It is resized and cropped to height x width.
            controlnet_conditioning_scale: factor of the ControlNet's outputs; 0: no effect.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, controlnet_conditioning_scale=controlnet_conditioning_scale, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        if not call.images:
            raise UserError("image=None must be an edge map, white lines on black, as a PIL image. Pass an edge map.")
        fitted = [fit(to_rgb(image, "black"), call.size_hw, False, Image.Resampling.LANCZOS) for image in call.images]
        maps = np.stack([np.asarray(image).mean(axis=2, dtype=np.float32) / 255 for image in fitted])
        edge_B1hw = F.avg_pool2d(torch.from_numpy(maps).unsqueeze(1), self.vae_scale_factor)
        edges = edge_B1hw.expand(-1, 3, -1, -1).repeat_interleave(call.num_images_per_prompt, dim=0)
        return ImageInputs(edges=edges.to(self._execution_device))


class RaphaelUpscalePipeline(RaphaelPipeline):
    """A pipeline for super-resolution: enlarges small images, guided by captions. Requires a super-resolution model."""

    @shows_options
    def __call__(self, prompt: Texts = None, image: Images = None, **options: Any) -> Output:
        """Enlarge small images to height x width, guided by captions.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. Height and width of the image must be 1 / `upscale.factor` of `height` and `width`.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        factor = (self.config.upscale or {}).get("factor", 0)
        if not factor:
            raise UserError(
                "RaphaelUpscalePipeline requires a super-resolution model, but this model is not one. Use RaphaelPipeline."
            )
        small = small_images(call.images, call.size_hw, factor).repeat_interleave(call.num_images_per_prompt, dim=0)
        return ImageInputs(small=small.to(self._execution_device))


def small_images(images: Sequence[Image.Image], size_hw: tuple[int, int], factor: int) -> Tensor:
    """Convert small images to float32 [B, 3, Hs, Ws] in -1..1, the input of a super-resolution model.

    Args:
        images: B PIL images.
        size_hw: height and width of the large images in pixels.
        factor: `upscale.factor` of the model: height and width of a large image, divided by those of its small image.

    Raises:
        UserError: `images` is empty, or an image has the wrong size.
    """
    small = [np.array(to_rgb(image)) for image in images]
    if not small:
        check_small(factor, None, size_hw, "image")
    for pixels in small:
        check_small(factor, pixels, size_hw, "image")
    return to_tensor(np.stack(small))
