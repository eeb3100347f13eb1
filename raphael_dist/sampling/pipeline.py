"""RAPHAEL as a diffusers pipeline.

Shape legend: B images, C latent channels, h and w latent height and width, H and W image height and width, Hs and Ws height
and width of a small image, Y text tokens, D text width.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import ImagePipelineOutput, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from raphael_dist.data.features.encoder_files import Model, Tokenizer, packaged_text_model
from raphael_dist.data.features.run_encoders import decode_latents, encode_images, run_text_encoder
from raphael_dist.data.features.tokens import tokenize, truncation_line
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseScheduler, late_start_warning
from raphael_dist.model.latents import downscale_factor
from raphael_dist.model.super_resolution import append_small_image, back_project
from raphael_dist.sampling.pipeline_arguments import (
    CALLBACK_INPUTS,
    CallArguments,
    Callback,
    as_list,
    check_embeddings,
    check_texts,
    for_each,
)
from raphael_dist.sampling.pipeline_files import PipelineFiles
from raphael_dist.sampling.pipeline_lora import LoraLoader
from raphael_dist.sampling.prompts import fit_image
from raphael_dist.sampling.sampler import initial_noise, to_pixels, to_tensor
from raphael_dist.text import JsonObject

_log = logging.getLogger(__name__)
Output = ImagePipelineOutput | tuple[Any]  # the images; a tuple with `return_dict=False`


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Image inputs of a pipeline call, in addition to noise and text. A field is None if the pipeline does not use it.

    Attributes:
        start: latents of the images to change, float32 [B, C, h, w].
        mask: 1 where latents are drawn, 0 where those of `start` are kept, float32 [B, 1, h, w].
        small: small images for super-resolution, float32 [B, 3, Hs, Ws] in -1..1.
        edges: edge maps for a ControlNet, float32 [B, 3, h, w] in 0..1.
    """

    start: Tensor | None = None
    mask: Tensor | None = None
    small: Tensor | None = None
    edges: Tensor | None = None


class Prompts(NamedTuple):
    """Text embeddings [B, Y, D] and masks, bool [B, Y], of B prompts and their negative prompts. Y: tokens, D: width.

    A mask is False at padding. The fields of negative prompts are None without guidance.
    """

    embeds: Tensor
    mask: Tensor
    negative_embeds: Tensor | None
    negative_mask: Tensor | None


class RaphaelPipeline(LoraLoader, PipelineFiles):
    """A diffusers pipeline that draws images from captions. With equal `seed` it draws what `raphael_dist.sample` draws."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers requires this name and type)
    _callback_tensor_inputs = list(CALLBACK_INPUTS)  # noqa: RUF012
    controlnet: Model = None  # set by RaphaelControlNetPipeline
    _interrupt, _num_timesteps, _guidance_scale, _guidance_rescale = False, 0, 1.0, 0.0

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
            text_encoder: a text encoder of transformers. None: calls pass embeddings.
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

    # ---- state of a call, as in diffusers ------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining steps. A callback can set `_interrupt` to True."""
        return self._interrupt

    @property
    def vae_scale_factor(self) -> int:
        """Number of image pixels per latent position, in height and in width."""
        if self.vae is not None:
            return downscale_factor(self.vae.config)
        largest = max(self.config.size)
        return max(1, largest // (self.unet.config.sample_size or largest))

    # ---- drawing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
            negative_prompt: one for all prompts, or one for each prompt.
            num_images_per_prompt: images for each prompt.
            eta: noise that DDIM adds in each step, from 0 (none) to 1.
            generator: generator of the initial noise, one for all or one for each image.
            latents: initial noise, [B, C, h, w].
            prompt_embeds: result of `encode_prompt`, [prompts, Y, D].
            negative_prompt_embeds: the same for negative prompts.
            prompt_attention_mask: bool [prompts, Y], False at padding. None: no padding.
            negative_prompt_attention_mask: the same for `negative_prompt_embeds`.
            output_type: "pil"; "np" [B, H, W, 3] or "pt" [B, 3, H, W] with values in 0..1; or "latent".
            return_dict: whether to return an ImagePipelineOutput or a tuple.
            guidance_rescale: factor phi of arXiv 2305.08891, Sec. 3.4, against overexposure.
            callback_on_step_end: called after each step with (pipeline, step, timestep, tensors); returns the tensors to
                replace.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback: latents, prompt_embeds,
                negative_prompt_embeds.
            seed: fixes the noise as in `raphael_dist.sample`, if neither `generator` nor `latents` is given.

        Raises:
            UserError: a value is not allowed.
        """
        return self._draw(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            output_type=output_type,
            return_dict=return_dict,
            guidance_rescale=guidance_rescale,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
        )

    def _draw(self, **arguments: Any) -> Output:
        """Draw images: check the arguments (fields of `CallArguments`), encode, denoise and decode."""
        size, steps, guidance = self.config.size, self.config.steps, self.config.guidance
        defaults = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
        call = CallArguments(**defaults | {name: value for name, value in arguments.items() if value is not None})
        call.check(self.vae_scale_factor, self.scheduler.config.num_train_timesteps)
        if self.vae is None and call.output_type != "latent" and self.unet.config.out_channels != 3:
            raise UserError(f"output_type={call.output_type!r} requires a vae, but the pipeline has none. Use 'latent'.")
        self._guidance_scale, self._guidance_rescale = float(call.guidance_scale), call.guidance_rescale
        self._interrupt = False
        noise, inputs = self._noise(call), self._read_images(call)
        prompts = Prompts(
            *self.encode_prompt(
                call.prompt,
                None,
                call.num_images_per_prompt,
                self.do_classifier_free_guidance,
                call.negative_prompt,
                call.prompt_embeds,
                call.negative_prompt_embeds,
                call.prompt_attention_mask,
                call.negative_prompt_attention_mask,
            )
        )
        latents = self._denoise(call, noise, inputs, prompts)
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
        """Return embeddings [B, Y, D] and masks, bool [B, Y], of prompts and of negative prompts (None without guidance).

        If embeddings are passed instead of texts, they are only repeated `num_images_per_prompt` times.

        Raises:
            UserError: embeddings do not fit the model, or a text is passed but the pipeline has no text encoder.
        """
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        device = self._execution_device if device is None else device
        width = None if self.unet is None else self.unet.config.cross_attention_dim
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(as_list(prompt), "prompt", device)
        check_embeddings("prompt_embeds", prompt_embeds, prompt_attention_mask, width)
        if not do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_attention_mask = None, None
        elif negative_prompt_embeds is None:
            texts = for_each("negative_prompt", negative_prompt or "", len(prompt_embeds))
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode(texts, "negative_prompt", device)
        copies, shape = num_images_per_prompt, prompt_embeds.shape
        prompt_embeds, prompt_attention_mask = _repeat(prompt_embeds, prompt_attention_mask, copies, device)
        if negative_prompt_embeds is not None:
            mask = negative_prompt_attention_mask
            check_embeddings("negative_prompt_embeds", negative_prompt_embeds, mask, width, shape)
            negative_prompt_embeds, negative_prompt_attention_mask = _repeat(negative_prompt_embeds, mask, copies, device)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode(self, texts: list[str], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(f"{name}={texts!r} requires a text encoder, but the pipeline has none. Give {name}_embeds.")
        limit = self.config.max_tokens
        batch, truncated = tokenize(self.tokenizer, texts, limit, "max_length")
        if truncated:
            _log.warning("%s", truncation_line("prompts", truncated, len(texts), limit))
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        features = run_text_encoder(self.text_encoder.eval(), ids, mask, self.tokenizer.eos_token_id)
        return features.tokens, features.mask

    def _noise(self, call: CallArguments) -> Tensor:
        """Return the initial noise of the call's images, float32 [B, C, h, w]."""
        copies, device, factor = call.num_images_per_prompt, self._execution_device, self.vae_scale_factor
        latent_shape = (self.unet.config.out_channels, call.height // factor, call.width // factor)
        shape = (call.num_prompts * copies, *latent_shape)
        generator = call.generator
        if call.latents is not None:
            if tuple(call.latents.shape) != shape:
                raise UserError(
                    f"latents must have the shape {list(shape)}, but it is {list(call.latents.shape)}. Change latents, "
                    "height or width."
                )
            return call.latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(
                f"generator must be one generator, or a list of one for each image ({shape[0]}), but the list has "
                f"{len(generator)}. Change its length."
            )
        if generator is None and call.seed is not None:
            numbers = [(i, copy) for i in range(call.num_prompts) for copy in range(copies)]
            return torch.stack([initial_noise(call.seed, i, latent_shape, copy) for i, copy in numbers]).to(device)
        return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))

    def _read_images(self, call: CallArguments) -> ImageInputs:
        """Return the image inputs of the call; none by default. Pipelines with image inputs override this method."""
        if self.config.upscale:
            raise UserError(
                "this model enlarges small images. Use RaphaelUpscalePipeline.from_pipe(pipeline) and give image."
            )
        return ImageInputs()

    def _encode_images(self, call: CallArguments) -> Tensor:
        """Return the latents of the images in `call.image`, float32 [B, C, h, w]."""
        if not call.images:
            raise UserError("image=None must be a PIL image, or one for each prompt. Pass an image.")
        device = self._execution_device
        images = to_tensor(np.stack([fit_image(image, call.size_hw) for image in call.images]))
        if self.vae is not None:
            images, _ = encode_images(self.vae.eval(), images, device)
        return images.to(device).repeat_interleave(call.num_images_per_prompt, dim=0)

    def _begin(self, call: CallArguments, noise: Tensor, inputs: ImageInputs) -> tuple[Tensor, Tensor]:
        """Return the latents with which the first step starts, float32 [B, C, h, w], and the timesteps [steps]."""
        scheduler = self.scheduler
        try:
            timesteps, steps = retrieve_timesteps(
                scheduler, call.num_inference_steps, self._execution_device, call.timesteps, call.sigmas
            )
        except ValueError as error:
            settings = f"timesteps={call.timesteps}, sigmas={call.sigmas}"
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{settings} must be supported by {type(scheduler).__name__}, but it reports: {reason}. Change them."
            ) from None
        if inputs.start is None or (inputs.mask is not None and call.strength == 1):
            if inputs.start is None and (late := late_start_warning(scheduler)):
                _log.warning("%s", late)
            return noise * scheduler.init_noise_sigma, timesteps
        skipped = (steps - min(int(steps * call.strength), steps)) * scheduler.order  # as in diffusers
        timesteps = timesteps[skipped:]
        if not len(timesteps):
            return inputs.start, timesteps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        return scheduler.add_noise(inputs.start, noise, timesteps[:1].expand(len(noise))), timesteps

    def _denoise(self, call: CallArguments, noise: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Return the latents after all denoising steps, float32 [B, C, h, w]."""
        latents, timesteps = self._begin(call, noise, inputs)
        self._num_timesteps, options = len(timesteps), self._step_options(call)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(call, latents, t, inputs, prompts)
                latents = self.scheduler.step(prediction, t, latents, **options).prev_sample
                if inputs.mask is not None and inputs.start is not None:
                    original = inputs.start
                    if i + 1 < len(timesteps):
                        original = self.scheduler.add_noise(original, noise, timesteps[i + 1 : i + 2].expand(len(original)))
                    latents = (1 - inputs.mask) * original + inputs.mask * latents
                latents, prompts = self._call_back(call, i, t, latents, prompts)
                bar.update()
        return latents

    def _call_back(
        self, call: CallArguments, number: int, t: Tensor, latents: Tensor, prompts: Prompts
    ) -> tuple[Tensor, Prompts]:
        """Call the user's callback after step `number`; return latents and prompts with the tensors that it replaces."""
        callback = call.callback_on_step_end
        if callback is None:
            return latents, prompts
        # diffusers' PipelineCallback has its own list of tensor names.
        names = getattr(callback, "tensor_inputs", call.callback_on_step_end_tensor_inputs)
        values = (latents, prompts.embeds, prompts.negative_embeds)
        tensors: JsonObject = dict(zip(CALLBACK_INPUTS, values, strict=True))
        tensors |= callback(self, number, t, {name: tensors[name] for name in names})
        embeds, negative = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
        return tensors["latents"], prompts._replace(embeds=embeds, negative_embeds=negative)

    def _step_options(self, call: CallArguments) -> JsonObject:
        """Return those of the options `eta` and `generator` that the method `step` of this scheduler accepts."""
        generator = call.generator
        if generator is None and call.seed is not None:
            generator = torch.Generator(self._execution_device).manual_seed(call.seed)
        known = inspect.signature(self.scheduler.step).parameters
        return {k: v for k, v in {"eta": call.eta, "generator": generator}.items() if k in known}

    def _predict(self, call: CallArguments, latents: Tensor, t: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Return the prediction with guidance, eps_null + guidance * (eps_text - eps_null), float32 [B, C, h, w]."""
        x = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
        text, mask, null, null_mask = prompts
        if not self.do_classifier_free_guidance or null is None or null_mask is None:
            return self._run_unet(call, x, t, inputs, text, mask)
        text, mask = torch.cat([text, null]), torch.cat([mask, null_mask])
        of_text, of_null = self._run_unet(call, x.repeat(2, 1, 1, 1), t, inputs, text, mask).chunk(2)
        prediction = of_null + self.guidance_scale * (of_text - of_null)
        if self.guidance_rescale > 0:
            prediction = rescale_noise_cfg(prediction, of_text, self.guidance_rescale)
        return prediction

    def _run_unet(
        self, call: CallArguments, x: Tensor, t: Tensor, inputs: ImageInputs, text: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the U-Net's prediction for latents `x` at timestep `t`, float32 in the shape of `x`.

        `x` and `text` have B samples, or 2 B: those with prompts, then those with negative prompts.
        """
        unet, options = self.unet.eval(), JsonObject()
        text, timestep = text.to(unet.dtype), torch.full((len(x),), t.item(), device=x.device)
        if not isinstance(unet, UNet2DConditionModel):  # diffusers' U-Net is trained without a mask
            options["encoder_attention_mask"] = mask
        if inputs.small is not None:
            small = inputs.small.repeat(len(x) // len(inputs.small), 1, 1, 1)
            x = append_small_image(x, small, self.config.upscale["patch"])
        residuals = JsonObject()
        if inputs.edges is not None:
            edges = inputs.edges.repeat(len(x) // len(inputs.edges), 1, 1, 1).to(unet.dtype)
            scale = call.controlnet_conditioning_scale
            skips, middle = self.controlnet(x, timestep, text, edges, scale, **options, return_dict=False)
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        return cast(Tensor, unet(x, timestep, encoder_hidden_states=text, **options, **residuals).sample.float())

    def _decode(self, latents: Tensor, small: Tensor | None, output_type: str) -> Any:
        """Decode latents to PIL images, or to values in 0..1: arrays [B, H, W, 3] ("np") or tensors [B, 3, H, W] ("pt").

        `small`: small images of super-resolution, [B, 3, Hs, Ws] in -1..1, or None.
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
