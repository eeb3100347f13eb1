"""RAPHAEL as a diffusers pipeline.

Shape legend: B images, C latent channels, h and w latent height and width, H and W image height and width, Hs and Ws height
and width of a small image, Y text tokens, D text width.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from raphael_dist.data.features.encoder_files import Model, Tokenizer, packaged_text_model
from raphael_dist.data.features.run_encoders import decode_latents, encode_images, run_text_encoder
from raphael_dist.data.features.tokens import tokenize, truncation_line
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseScheduler
from raphael_dist.model.latents import downscale_factor
from raphael_dist.model.super_resolution import back_project
from raphael_dist.sampling.pipeline_arguments import (
    CALLBACK_INPUTS,
    CallArguments,
    Callback,
    Texts,
    as_list,
    check_embeddings,
    check_texts,
    for_each,
)
from raphael_dist.sampling.pipeline_denoising import Denoiser, ImageInputs, Prompts
from raphael_dist.sampling.pipeline_lora import LoraLoader
from raphael_dist.sampling.prompts import fit_rgb
from raphael_dist.sampling.sampler import to_pixels, to_tensor
from raphael_dist.text import JsonObject

Output = ImagePipelineOutput | tuple[Any]  # the images; a tuple with `return_dict=False`


class RaphaelPipeline(LoraLoader, Denoiser):
    """A diffusers pipeline that draws images from captions. Equal seeds give the same images as `raphael_dist.sample`."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers requires this name and type)
    _callback_tensor_inputs = list(CALLBACK_INPUTS)  # noqa: RUF012

    def __init__(
        self,
        unet: Model,
        scheduler: NoiseScheduler,
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
        """Build the pipeline from its components.

        Args:
            unet: a RaphaelUNet2D or UNet2DConditionModel.
            scheduler: any of diffusers' Karras schedulers (`KarrasDiffusionSchedulers`).
            vae: an autoencoder of diffusers. None: the model works on pixels, or only latents are returned.
            text_encoder: a text encoder of transformers. None: calls must pass embeddings instead of prompts.
            tokenizer: tokenizer of the text encoder.
            max_tokens: largest number of tokens of a caption; longer ones are truncated.
            steps: default number of inference steps.
            guidance: default guidance scale.
            size: default (height, width) in pixels.
            text: name of a text encoder that needs no folder ("minilm" or "characters"), if `text_encoder` is None.
            upscale: the section `upscale` of the configuration, for a super-resolution model.
        """
        super().__init__()
        if text_encoder is None and text is not None:
            text_encoder, tokenizer = packaged_text_model(text)
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(
            max_tokens=max_tokens, steps=steps, guidance=guidance, size=list(size), text=text, upscale=upscale
        )

    @property
    def vae_scale_factor(self) -> int:
        """Number of image pixels per latent position, in height and in width."""
        if self.vae is not None:
            return downscale_factor(self.vae.config)
        largest = max(self.config.size)
        return max(1, largest // (self.unet.config.sample_size or largest))

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image at a time, which takes less memory."""
        self._vae_for("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode all images at once, as before `enable_vae_slicing`."""
        self._vae_for("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in overlapping tiles, which takes less memory."""
        self._vae_for("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode images as a whole, as before `enable_vae_tiling`."""
        self._vae_for("disable_vae_tiling").disable_tiling()

    def _vae_for(self, method: str) -> Model:
        if self.vae is None:
            raise UserError(f"{method}() requires a vae, but the pipeline has none. Do not call {method}().")
        return self.vae

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | None = None,
    ) -> Output:
        """Draw `num_images_per_prompt` images for each prompt.

        Defaults of size, steps and guidance are those of the training run.

        Args:
            prompt: captions. Alternative: `prompt_embeds`.
            height: height of the images in pixels.
            width: width of the images in pixels.
            num_inference_steps: denoising steps.
            timesteps: timesteps to use instead of `num_inference_steps`, if the scheduler supports this.
            sigmas: sigmas to use instead of `num_inference_steps`, if the scheduler supports this.
            guidance_scale: weight of the prompt; 1 or less turns guidance off.
            negative_prompt: one negative prompt for all prompts, or one for each prompt.
            num_images_per_prompt: number of images to draw for each prompt.
            eta: noise that DDIM adds in each step, from 0 (none) to 1.
            generator: generator of the initial noise, one for all or one for each image.
            latents: initial noise for B images, [B, C, h, w].
            prompt_embeds: text embeddings from `encode_prompt`, [prompts, tokens, text width].
            negative_prompt_embeds: the same for negative prompts.
            prompt_attention_mask: bool [prompts, tokens], False at padding. None: no padding.
            negative_prompt_attention_mask: the same for `negative_prompt_embeds`.
            output_type: "pil"; "np" [B, H, W, 3] or "pt" [B, 3, H, W] with values in 0..1; or "latent".
            return_dict: whether to return an ImagePipelineOutput or a tuple.
            guidance_rescale: factor phi of arXiv 2305.08891, Sec. 3.4, against overexposure.
            callback_on_step_end: called after each step with (pipeline, step, timestep, tensors); returns the tensors to
                replace.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback: latents, prompt_embeds (with guidance
                the embeddings of the negative prompts, then those of the prompts), negative_prompt_embeds.
            seed: fixes the noise as in `raphael_dist.sample`, if neither `generator` nor `latents` is given.

        Raises:
            UserError: a value is not allowed.
        """
        arguments = dict(locals())  # first, while there are no other local variables
        del arguments["self"]
        return self._draw(**arguments)

    @torch.no_grad()
    def _draw(self, **arguments: Any) -> Output:
        """Draw images: check the arguments (fields of `CallArguments`), encode, denoise and decode."""
        size, steps, guidance = self.config.size, self.config.steps, self.config.guidance
        defaults = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
        call = CallArguments(**defaults | {name: value for name, value in arguments.items() if value is not None})
        call.check(self.vae_scale_factor, self.scheduler.config.num_train_timesteps)
        if self.vae is None and call.output_type != "latent" and self.unet.config.out_channels != 3:
            raise UserError(
                f"output_type={call.output_type!r} requires a vae, but the pipeline has none. Use output_type='latent'."
            )
        self._guidance_scale, self._guidance_rescale = float(call.guidance_scale), call.guidance_rescale
        self._interrupt = False
        noise, inputs = self._noise(call), self._read_images(call)
        copies, guided = call.num_images_per_prompt, self.do_classifier_free_guidance
        encoded = self.encode_prompt(call.prompt, None, copies, guided, call.negative_prompt, *call.embeddings)
        latents = self._denoise(call, noise, inputs, Prompts.of(*encoded))
        images = latents if call.output_type == "latent" else self._decode(latents, inputs.small, call.output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return text embeddings and masks of prompts and of negative prompts, each repeated for the images of a prompt.

        Args:
            prompt: one caption or several.
            device: device of the results; None: that of the pipeline.
            num_images_per_prompt: how often each result is repeated.
            do_classifier_free_guidance: False: negative prompts are not encoded.
            negative_prompt: one negative prompt for all prompts, or one for each prompt; None: "".
            prompt_embeds: embeddings [prompts, Y, D] to use instead of encoding `prompt`.
            negative_prompt_embeds: the same for negative prompts.
            prompt_attention_mask: mask of `prompt_embeds`, bool [prompts, Y], False at padding. None: no padding.
            negative_prompt_attention_mask: the same for `negative_prompt_embeds`.

        Returns:
            Embeddings [B, Y, D] and mask, bool [B, Y], of prompts; then those of negative prompts, None without guidance.
            B is the number of prompts times `num_images_per_prompt`.

        Raises:
            UserError: embeddings do not fit the model, or a prompt is passed but the pipeline has no text encoder.
        """
        masks = (prompt_attention_mask, negative_prompt_attention_mask)
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, *masks)
        device = self._execution_device if device is None else device
        width = None if self.unet is None else self.unet.config.cross_attention_dim
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(as_list(prompt), "prompt", device)
        check_embeddings("prompt_embeds", prompt_embeds, prompt_attention_mask, width)
        if not do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_attention_mask = None, None
        elif negative_prompt_embeds is None:
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode_negative(
                negative_prompt, prompt_embeds, device
            )
        copies, shape = num_images_per_prompt, prompt_embeds.shape
        prompt_embeds, prompt_attention_mask = _repeat(prompt_embeds, prompt_attention_mask, copies, device)
        if negative_prompt_embeds is not None:
            mask = negative_prompt_attention_mask
            check_embeddings("negative_prompt_embeds", negative_prompt_embeds, mask, width, shape)
            negative_prompt_embeds, negative_prompt_attention_mask = _repeat(negative_prompt_embeds, mask, copies, device)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode_negative(self, negative_prompt: Texts, prompt_embeds: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if prompt_embeds.shape[1] != self.config.max_tokens:
            raise UserError(
                f"prompt_embeds of shape {list(prompt_embeds.shape)} require negative_prompt_embeds of the same shape, "
                f"because negative prompts are encoded to {self.config.max_tokens} tokens. Pass negative_prompt_embeds."
            )
        texts = for_each("negative_prompt", negative_prompt or "", len(prompt_embeds))
        return self._encode(texts, "negative_prompt", device)

    def _encode(self, texts: list[str], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(f"{name}={texts!r} requires a text encoder, but the pipeline has none. Pass {name}_embeds.")
        limit = self.config.max_tokens
        batch, truncated = tokenize(self.tokenizer, texts, limit, "max_length")
        if truncated:
            line = truncation_line(f"{name.replace('_', ' ')}s", truncated, len(texts), limit)
            logging.getLogger(__name__).warning("%s", line)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        features = run_text_encoder(self.text_encoder.eval(), ids, mask, self.tokenizer.eos_token_id)
        return features.tokens, features.mask

    def _read_images(self, call: CallArguments) -> ImageInputs:
        """Return the image inputs of the call; none by default. Pipelines with image inputs override this method."""
        if self.config.upscale:
            raise UserError(
                "this model enlarges small images, but this pipeline takes no image. Use "
                "RaphaelUpscalePipeline.from_pipe(pipeline) and pass it a small image as the argument image."
            )
        return ImageInputs()

    def _encode_images(self, call: CallArguments, rgb_images: Sequence[Image.Image]) -> Tensor:
        """Return the latents of images, float32 [B, C, h, w]. `rgb_images`: the images `call.images`, converted to RGB."""
        if not rgb_images:
            raise UserError("image=None must be a PIL image, or a list with one image for each prompt. Pass an image.")
        device = self._execution_device
        images = to_tensor(np.stack([fit_rgb(image, call.size_hw) for image in rgb_images]))
        if self.vae is not None:
            images, _ = encode_images(self.vae.eval(), images, device)
        return images.to(device).repeat_interleave(call.num_images_per_prompt, dim=0)

    def _decode(self, latents: Tensor, small: Tensor | None, output_type: str) -> Any:
        """Decode latents to PIL images, or to values in 0..1: arrays [B, H, W, 3] ("np") or tensors [B, 3, H, W] ("pt").

        `small`: input images of super-resolution, [B, 3, Hs, Ws] in -1..1. The results are corrected so that downscaled
        results approach these images. None: no correction.
        """
        images = latents.float().clamp(-1, 1)
        if self.vae is not None:
            images = decode_latents(self.vae.eval(), latents, self._execution_device)
        if small is not None:
            images = back_project(images, small.to(images.device), self.config.upscale["back_projections"])
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_pixels(images)]
        unit = (images + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def _repeat(embeds: Tensor, mask: Tensor | None, copies: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `embeds` [B, Y, D] and `mask` [B, Y] with each sample repeated `copies` times, on the device.

    A mask of None becomes all True.
    """
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    return embeds.to(device).repeat_interleave(copies, dim=0), mask.to(device).bool().repeat_interleave(copies, dim=0)
