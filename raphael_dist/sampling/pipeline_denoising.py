"""The denoising loop of a pipeline: from initial noise to latents, with guidance, image inputs and callbacks.

Shape legend: B images, C latent channels, h and w latent height and width, Hs and Ws height and width of a small image,
Y text tokens, D text width.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from raphael_dist.data.features.encoder_files import Model
from raphael_dist.errors import UserError
from raphael_dist.model.diffusers_model import uncompiled
from raphael_dist.model.super_resolution import append_small_image
from raphael_dist.sampling.pipeline_arguments import CALLBACK_INPUTS, CallArguments, as_list
from raphael_dist.sampling.pipeline_files import PipelineFiles
from raphael_dist.sampling.sampler import add_noise, first_latents, initial_noise, model_input
from raphael_dist.text import JsonObject


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
    """Text embeddings of B prompts, as diffusers passes them to callbacks. Y: tokens, D: width.

    Attributes:
        embeds: embeddings of the prompts, [B, Y, D]; with guidance [2 B, Y, D], where those of negative prompts come first.
        mask: mask of `embeds`, bool [B, Y] or [2 B, Y], False at padding.
        negative_embeds: embeddings of the negative prompts alone, [B, Y, D]; None without guidance.
    """

    embeds: Tensor
    mask: Tensor
    negative_embeds: Tensor | None

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, negative_embeds: Tensor | None, negative_mask: Tensor | None) -> "Prompts":
        """Return the prompts of a call, from the four values that `RaphaelPipeline.encode_prompt` returns."""
        if negative_embeds is None or negative_mask is None:
            return cls(embeds, mask, None)
        return cls(torch.cat([negative_embeds, embeds]), torch.cat([negative_mask, mask]), negative_embeds)

    def with_embeds(self, embeds: Tensor, negative_embeds: Tensor | None, batch: int, guided: bool) -> "Prompts":
        """Return the prompts with `embeds` and `negative_embeds`, the embeddings that a callback returned.

        `batch`: number of images B. `guided`: whether the next step has guidance. Raises UserError if `embeds` has a shape
        that the next step cannot use.
        """
        if guided and negative_embeds is not None and negative_embeds is not self.negative_embeds:
            embeds = torch.cat([negative_embeds, embeds[-batch:]])
        rows = (2 * batch,) if guided else (batch, 2 * batch)
        if len(embeds) not in rows or embeds.shape[1:] != self.embeds.shape[1:]:
            raise UserError(
                f"callback_on_step_end must return prompt_embeds of shape {[rows[0], *self.embeds.shape[1:]]}, but it is "
                f"{list(embeds.shape)}. Return the embeddings of the negative prompts and then those of the prompts, or set "
                "pipeline._guidance_scale = 0 and return the embeddings of the prompts."
            )
        return self._replace(embeds=embeds, negative_embeds=negative_embeds)


class Denoiser(PipelineFiles):
    """Base class of this project's pipelines: runs the denoising steps of a call.

    Its properties give callbacks the state of the call, under diffusers' names.
    """

    controlnet: Model = None  # set by RaphaelControlNetPipeline
    _interrupt, _num_timesteps, _guidance_scale, _guidance_rescale = False, 0, 1.0, 0.0

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
        """Whether the pipeline skips the remaining denoising steps of the current call.

        A callback sets the attribute `_interrupt` to True to stop early; the images are then made from the current latents.
        """
        return self._interrupt

    def _noise(self, call: CallArguments) -> Tensor:
        """Return the initial noise of the call's images, float32 [B, C, h, w]."""
        copies, device, factor = call.num_images_per_prompt, self._execution_device, self.vae_scale_factor
        latent_shape = (self.unet.config.out_channels, call.height // factor, call.width // factor)
        shape = (call.num_prompts * copies, *latent_shape)
        generator = call.generator
        if call.latents is not None:
            if tuple(call.latents.shape) != shape:
                raise UserError(
                    f"latents must have the shape {list(shape)}, but it is {list(call.latents.shape)}. Pass latents of this "
                    "shape, or change height, width or the number of prompts."
                )
            return call.latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(
                f"generator must be one generator, or a list with a generator for each image ({shape[0]}), but the list has "
                f"{len(generator)}. Pass one generator, or a list of length {shape[0]}."
            )
        if generator is None and call.seed is not None:
            numbers = [(i, copy) for i in range(call.num_prompts) for copy in range(copies)]
            return torch.stack([initial_noise(call.seed, i, latent_shape, copy) for i, copy in numbers]).to(device)
        return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))

    def _begin(self, call: CallArguments, noise: Tensor, inputs: ImageInputs) -> tuple[Tensor, Tensor]:
        """Set the scheduler's timesteps, and return the latents with which the first step starts and the steps' timesteps.

        The latents are float32 [B, C, h, w]: the initial noise `noise`, or the noised latents of the images to change.
        """
        scheduler = self.scheduler
        try:
            _, steps = retrieve_timesteps(
                scheduler, call.num_inference_steps, self._execution_device, call.timesteps, call.sigmas
            )
        except ValueError as error:
            settings, remedy = f"timesteps={call.timesteps}, sigmas={call.sigmas}", "Leave out both"
            if call.timesteps is None and call.sigmas is None:
                settings, remedy = f"num_inference_steps={call.num_inference_steps}", "Use another number"
            reason = str(error).splitlines()[0].rstrip(". ")
            raise UserError(
                f"{settings} must be supported by {type(scheduler).__name__}, but it reports: {reason}. {remedy}, "
                "or another scheduler."
            ) from None
        self._seed_scheduler(call, len(noise))
        start = None if inputs.mask is not None and call.strength == 1 else inputs.start
        return first_latents(scheduler, noise, steps, start, call.strength)

    def _denoise(self, call: CallArguments, noise: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Run all denoising steps from the initial noise `noise`; return the latents after them, float32 [B, C, h, w]."""
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
                        original = add_noise(self.scheduler, original, noise, timesteps[i + 1])
                    latents = (1 - inputs.mask) * original + inputs.mask * latents
                latents, prompts = self._call_back(call, i, t, latents, prompts)
                bar.update()
        return latents

    def _call_back(
        self, call: CallArguments, number: int, t: Tensor, latents: Tensor, prompts: Prompts
    ) -> tuple[Tensor, Prompts]:
        """Call the user's callback after step `number`; return `latents` and `prompts` with the changes that it returns."""
        callback = call.callback_on_step_end
        if callback is None:
            return latents, prompts
        values = (latents, prompts.embeds, prompts.negative_embeds)
        tensors: JsonObject = dict(zip(CALLBACK_INPUTS, values, strict=True))
        changes = callback(self, number, t, {name: tensors[name] for name in call.callback_tensors})
        if not isinstance(changes, dict):
            raise UserError(
                "callback_on_step_end must return a dict of the tensors to replace, but it returned "
                f"{type(changes).__name__}. Return {{}} to replace none."
            )
        tensors |= changes
        replaced = (tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
        return tensors["latents"], prompts.with_embeds(*replaced, len(latents), self._is_guided(prompts))

    def _is_guided(self, prompts: Prompts) -> bool:
        return self.do_classifier_free_guidance and prompts.negative_embeds is not None

    def _generator(self, call: CallArguments) -> Any:
        """Return the generators of the noise that the steps add: one generator, a list with one per image, or None."""
        if call.generator is None and call.seed is not None:
            return torch.Generator(self._execution_device).manual_seed(call.seed)
        return call.generator

    def _seed_scheduler(self, call: CallArguments, batch: int) -> None:
        """Set the seeds of a scheduler that makes its own noise, one for each of `batch` images (DPMSolverSDEScheduler).

        Seeds in the scheduler's configuration are kept. Without a generator or a seed in the call, the noise is random.
        """
        if self.scheduler.config.get("noise_sampler_seed", 0) is None:
            generators, seeds = as_list(self._generator(call)), None
            if generators != [None]:
                each = generators * batch if len(generators) == 1 else generators
                seeds = [int(torch.randint(2**31, (1,), generator=g, device=g.device)) for g in each]
            self.scheduler.noise_sampler_seed = seeds

    def _step_options(self, call: CallArguments) -> JsonObject:
        """Return those of the options `eta` and `generator` that the method `step` of this scheduler accepts."""
        known = inspect.signature(self.scheduler.step).parameters
        return {k: v for k, v in {"eta": call.eta, "generator": self._generator(call)}.items() if k in known}

    def _predict(self, call: CallArguments, latents: Tensor, t: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Return the prediction for `latents` at timestep `t`, float32 [B, C, h, w].

        With guidance it is eps_null + guidance * (eps_text - eps_null), from predictions for negative prompts and prompts.
        """
        x = model_input(self.scheduler, latents, t).to(self.unet.dtype)
        batch, text, mask = len(x), prompts.embeds, prompts.mask
        if not self._is_guided(prompts):
            return self._run_unet(call, x, t, inputs, text[-batch:], mask[-batch:])
        text, mask = text.roll(batch, dims=0), mask.roll(batch, dims=0)  # the order in which `Sampler` computes them
        of_text, of_null = self._run_unet(call, x.repeat(2, 1, 1, 1), t, inputs, text, mask).chunk(2)
        prediction = of_null + self.guidance_scale * (of_text - of_null)
        if self.guidance_rescale > 0:
            prediction = rescale_noise_cfg(prediction, of_text, self.guidance_rescale)
        return prediction

    def _run_unet(
        self, call: CallArguments, x: Tensor, t: Tensor, inputs: ImageInputs, text: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the U-Net's prediction for latents `x` at timestep `t`, float32 in the shape of `x`.

        `x`, `text` (embeddings) and `mask` (of the embeddings) have B samples, or with guidance 2 B: first B samples
        with the prompts, then the same B samples with the negative prompts.
        """
        unet, options = self.unet.eval(), JsonObject()
        text, timestep = text.to(unet.dtype), torch.full((len(x),), t.item(), device=x.device)
        if not isinstance(uncompiled(unet), UNet2DConditionModel):  # diffusers' U-Net is trained without a mask
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
