"""A RAPHAEL checkpoint in diffusers' terms: the U-Net as a diffusers model, and the sampler as a pipeline.

from raphael_dist.pipeline import RaphaelPipeline
pipeline = RaphaelPipeline.from_pretrained("exported")
pipeline("a red heart, noto style", num_inference_steps=20, guidance_scale=4.0).images[0].save("heart.png")
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from raphael_dist.config import config_from_tree
from raphael_dist.config_upscale import Upscale
from raphael_dist.convert.adapter import read_adapter
from raphael_dist.convert.layouts.diffusers import CODE, PIPELINE, PIPELINE_CODE
from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures, packaged_text_model
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.upscale import back_project
from raphael_dist.sampling.prompts import fit_picture
from raphael_dist.sampling.sampling import (
    Denoise,
    OnStep,
    check_small,
    enlarging,
    initial_noise,
    sample_latents,
    to_pixels,
    to_tensor,
)

_Pipeline: Any = DiffusionPipeline  # type checkers do not see what its mixins add
_OUTPUTS = ("pil", "np", "pt", "latent")


class RaphaelUNet2D(ModelMixin, ConfigMixin):
    """`RaphaelUNet` as a model of diffusers, under the same parameter names."""

    @register_to_config
    def __init__(self, tree: dict[str, Any]) -> None:
        """`tree`: the sections `model`, `edge` and `run` of a configuration, and `upscale` where it is on."""
        super().__init__()
        self._core = [RaphaelUNet(config_from_tree(tree))]  # in a list: not a child, whose name would prefix the parameters
        for name, child in self._core[0].named_children():
            self.add_module(name, child)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        end_of_text: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As UNet2DConditionModel's, for latents [B, C, h, w] and text tokens [B, Y, D].

        encoder_attention_mask: bool [B, Y], False at padding; None: there is none. end_of_text: int64 [B], the index of the
        end-of-text token; None: the last that is attended to.
        """
        batch, tokens = encoder_hidden_states.shape[:2]
        mask = encoder_attention_mask
        mask = torch.ones(batch, tokens, device=sample.device) if mask is None else mask
        end = (mask.long().sum(dim=1) - 1).clamp(min=0) if end_of_text is None else end_of_text
        timestep_B = torch.as_tensor(timestep, device=sample.device).expand(batch)
        prediction = self._core[0](sample, timestep_B, encoder_hidden_states, mask.bool(), end).prediction
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _denoiser(unet: Any) -> Denoise:
    """Return the prediction of a U-Net of diffusers, ours or its own, as a function of captions."""

    def denoise(x: Tensor, timestep: Tensor, text: TextFeatures) -> Tensor:
        more = (
            {} if isinstance(unet, UNet2DConditionModel) else {"encoder_attention_mask": text.mask, "end_of_text": text.end}
        )
        return cast(Tensor, unet(x, timestep, encoder_hidden_states=text.tokens, **more).sample)

    return denoise


class RaphaelPipeline(_Pipeline):
    """Samples exactly as `raphael_dist.sample` does: the same `seed` gives the same image."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (the name and type that diffusers looks for)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: RaphaelUNet2D | UNet2DConditionModel,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        max_tokens: int = 77,
        steps: int = 25,
        guidance: float = 4.5,
        size: Sequence[int] = (512, 512),
        text: str | None = None,
        upscale: dict[str, Any] | None = None,
    ) -> None:
        """`text`: the name of a text encoder that ships in a package, where the folder has none of its own.

        `upscale`: the section of that name of a model that enlarges small pictures.
        """
        super().__init__()
        if text_encoder is None and text is not None:
            text_encoder, tokenizer = packaged_text_model(text)
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(
            max_tokens=max_tokens, steps=steps, guidance=guidance, size=list(size), text=text, upscale=upscale
        )

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', which needs no leave to run the folder's code when it is asked for this class itself."""
        found = super().load_config(*args, **kwargs)
        for config in found if isinstance(found, tuple) else (found,):
            if isinstance(config.get("_class_name"), list):
                config["_class_name"] = config["_class_name"][-1]
        return found

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'; the folder also loads as a DiffusionPipeline, by the code beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [CODE, PIPELINE]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / f"{CODE}.py").write_text(PIPELINE_CODE)

    @torch.no_grad()
    def load_lora(self, path: Any, scale: float = 1.0) -> None:
        """Add adapters to the U-Net in memory, in place of those that were loaded before; files stay as they are.

        path: peft's folder, or a run that trained them. scale: how much of them. UserError: they do not fit.
        """
        adapter, weights = read_adapter(Path(path), option="load_lora"), dict(self.unet.named_parameters())
        adapter.check({name: tuple(p.shape) for name, p in weights.items()}, "load_lora")
        self.unload_lora()
        # Kept on the host: taking the same again from a rounded sum would not give the weights back.
        self._without_lora: dict[str, Tensor] = {
            name: weights[name].detach().to("cpu", copy=True) for name in adapter.factors
        }
        for name in adapter.factors:
            weights[name] += (scale * adapter.delta(name)).to(weights[name])

    @torch.no_grad()
    def unload_lora(self) -> None:
        """Put the U-Net's own weights back, bit for bit."""
        weights = dict(self.unet.named_parameters())
        for name, value in getattr(self, "_without_lora", {}).items():
            weights[name].copy_(value)
        self._without_lora = {}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float = 0.8,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `num_images_per_prompt` images of each prompt. Arguments are those of diffusers' Stable Diffusion.

        Defaults of size, steps and guidance are those of the run that was exported. `image`, a PIL image or one for each
        prompt, is drawn anew by the share `strength` of the steps; a model of super-resolution enlarges it. `seed` fixes the
        noise as `raphael_dist.sample` does, where neither `generator` nor `latents` is given. UserError: an argument outside
        what is allowed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        size_hw = (int(height or self.config.size[0]), int(width or self.config.size[1]))
        encoder = ImageEncoder.of(None if self.vae is None else self.vae.eval())
        negatives = _for_each("negative_prompt", negative_prompt or "", prompts)
        self._check(prompts, steps, strength, size_hw, encoder.factor, output_type, callback_on_step_end_tensor_inputs)
        copies, unet, device = num_images_per_prompt, self.unet.eval(), self._execution_device
        text = TextEncoder.of(self.text_encoder.eval(), self.tokenizer, self.config.max_tokens, "pipeline")
        shape = (encoder.channels, size_hw[0] // encoder.factor, size_hw[1] // encoder.factor)
        noise = self._noise(len(prompts), copies, shape, device, generator, latents, seed)
        denoise, start = _denoiser(unet), None
        upscale = Upscale(**(self.config.upscale or {}))
        decode = encoder.decode
        if upscale.factor:
            small = _small(image, prompts, copies, size_hw, upscale).to(device)
            denoise = enlarging(denoise, small, upscale.patch)
            decode = partial(_decode_beside, encoder, small, upscale.back_projections)
        elif image is not None:
            start = self._start(image, prompts, copies, size_hw, encoder).to(device)
        with self.progress_bar(total=steps if start is None else min(int(steps * strength), steps)) as bar:
            found = sample_latents(
                denoise,
                self.scheduler,
                noise,
                _repeated(text.encode(prompts), copies),
                _repeated(text.encode(negatives), copies),
                steps=steps,
                guidance=guidance,
                dtype=unet.dtype,
                start_BChw=start,
                strength=strength,
                on_step=self._on_step(callback_on_step_end, bar),
            )
        images = _as(output_type, found, decode)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(
        self,
        prompts: list[str],
        steps: int,
        strength: float,
        size_hw: tuple[int, int],
        factor: int,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise UserError(f"prompt: given {prompts!r}, must be a text or a list of texts")
        if not 1 <= steps < self.scheduler.config.num_train_timesteps:
            last = self.scheduler.config.num_train_timesteps - 1
            raise UserError(f"num_inference_steps: given {steps}, allowed 1 to {last}")
        if any(side < factor or side % factor for side in size_hw):
            raise UserError(f"height, width: given {list(size_hw)}, must be multiples of {factor}")
        if not 0 <= strength <= 1:
            raise UserError(f"strength: given {strength}, allowed 0 to 1")
        if output_type not in _OUTPUTS:
            raise UserError(f"output_type: given {output_type!r}, allowed {', '.join(_OUTPUTS)}")
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs: given {list(callback_inputs)}, allowed ['latents']")

    def _noise(
        self,
        prompts: int,
        copies: int,
        shape: tuple[int, ...],
        device: torch.device,
        generator: Any,
        latents: Tensor | None,
        seed: int | None,
    ) -> Tensor:
        wanted = (prompts * copies, *shape)
        if latents is not None:
            if tuple(latents.shape) != wanted:
                raise UserError(f"latents: given {list(latents.shape)}, must be {list(wanted)}")
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != wanted[0]:
            raise UserError(f"generator: {len(generator)} given for {wanted[0]} images; give one, or one for each")
        if generator is None and seed is not None:
            noise = [initial_noise(seed, i, shape, copy) for i in range(prompts) for copy in range(copies)]
            return torch.stack(noise).to(device)
        return randn_tensor(wanted, generator=generator, device=device, dtype=torch.float32)

    def _start(self, image: Any, prompts: list[str], copies: int, size_hw: tuple[int, int], encoder: ImageEncoder) -> Tensor:
        pictures = [fit_picture(one, size_hw) for one in _for_each("image", image, prompts)]
        mean, _ = encoder.encode(to_tensor(np.stack(pictures)))
        return mean.repeat_interleave(copies, dim=0)

    def _on_step(self, callback: Any, bar: Any) -> OnStep:
        def on_step(number: int, timestep: Tensor, latents: Tensor) -> Tensor:
            bar.update()
            if callback is None:
                return latents
            return cast(Tensor, callback(self, number, timestep, {"latents": latents}).get("latents", latents))

        return on_step


def _for_each(name: str, given: Any, prompts: list[str]) -> list[Any]:
    """Return one value for each prompt, of one for all or of a list. UserError: a list of another length."""
    values = list(given) if isinstance(given, list | tuple) else [given] * len(prompts)
    if len(values) != len(prompts):
        raise UserError(f"{name}: {len(values)} given for {len(prompts)} prompts; give one, or one for each")
    return values


def _small(image: Any, prompts: list[str], copies: int, size_hw: tuple[int, int], upscale: Upscale) -> Tensor:
    """Return small pictures, float32 [B, 3, Hs, Ws] in -1..1. UserError: not one for each prompt, or of another size."""
    pictures = [None if one is None else np.array(one.convert("RGB")) for one in _for_each("image", image, prompts)]
    for one in pictures:
        check_small(upscale, one, size_hw, "image")
    return to_tensor(np.stack([one for one in pictures if one is not None])).repeat_interleave(copies, dim=0)


def _repeated(text: TextFeatures, copies: int) -> TextFeatures:
    return TextFeatures(*(part.repeat_interleave(copies, dim=0) for part in (text.tokens, text.mask, text.end)))


def _decode_beside(encoder: ImageEncoder, small: Tensor, times: int, latents: Tensor) -> Tensor:
    images = encoder.decode(latents)
    return back_project(images, small.to(images.device), times)


def _as(output_type: str, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Any:
    """Return images as diffusers does: PIL, float arrays [B, H, W, 3] or tensors [B, 3, H, W] in 0..1, or latents."""
    if output_type == "latent":
        return latents
    decoded = decode(latents)
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in to_pixels(decoded)]
    unit = (decoded + 1) / 2
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
