"""Draws images from prompts: classifier-free guidance with diffusers' schedulers, starting from noise or from an image.

Shape legend: B images, C latent channels, h and w latent height and width, H and W image height and width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from raphael_dist.config.upscale import Upscale
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseScheduler, late_start_warning
from raphael_dist.model.super_resolution import append_small_image, back_project
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
# Predicts noise (or v) from noised latents [B, C, h, w], timesteps [B] and captions.
Denoise = Callable[[Tensor, Tensor, TextFeatures], Tensor]


@dataclass(frozen=True)
class Request:
    """One image to draw. Its noise depends only on `seed`, `index` and `copy`, not on the batch or the rank.

    Attributes:
        prompt, negative: caption and negative caption.
        size_hw: height and width in pixels.
        seed: seed of the noise.
        index: number of the prompt in its list.
        copy: number of the image among several images of one prompt.
        start: image to start from, uint8 [H, W, 3] of size `size_hw`. None: start from noise.
        edges: edge map for a model with a ControlNet, float32 [H, W] in 0..1, or None.
        small: small image for a super-resolution model, uint8 [Hs, Ws, 3], or None.
        label: text below the image in a grid. None: the prompt.
    """

    prompt: str
    size_hw: tuple[int, int]
    seed: int = 0
    index: int = 0
    copy: int = 0
    negative: str = ""
    start: np.ndarray | None = None
    edges: np.ndarray | None = None
    small: np.ndarray | None = None
    label: str | None = None


def initial_noise(seed: int, index: int, shape: tuple[int, ...], copy: int = 0) -> Tensor:
    """Return the initial noise of one image, standard normal, float32 of `shape`, on the CPU.

    The noise depends only on these arguments.

    Args:
        seed: seed of the noise.
        index: number of the prompt in its list.
        shape: shape of the noise, such as (C, h, w).
        copy: number of the image among several images of one prompt.
    """
    draw = generator(seed, Purpose.NOISE, index, extra=1 + copy)
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def denoiser(model: nn.Module, edge_Bhw: Tensor | None = None, small_B3HsWs: Tensor | None = None) -> Denoise:
    """Return a function (latents [B, C, h, w], timesteps [B], text features) -> prediction that runs the U-Net `model`.

    The prediction (of noise or v) is [B, C, h, w].

    Args:
        model: the U-Net.
        edge_Bhw: edge maps in 0..1 at the size of the latents, for the model's ControlNet. None: do not run the ControlNet.
        small_B3HsWs: small images, float32 in -1..1, for a super-resolution model, which are appended to the latents as
            channels.
    """

    def denoise(x: Tensor, timestep: Tensor, text: TextFeatures) -> Tensor:
        # The batch may hold captions, then negative captions; both use the same maps and small images.
        edges = [] if edge_Bhw is None else [None, edge_Bhw.repeat(len(x) // len(edge_Bhw), 1, 1)]
        if small_B3HsWs is not None:
            small = small_B3HsWs.repeat(len(x) // len(small_B3HsWs), 1, 1, 1)
            x = append_small_image(x, small, cast(Upscale, model.upscale).patch)
        return model(x, timestep, text.tokens, text.mask, text.end, *edges).prediction

    return denoise


@torch.no_grad()
def sample_latents(
    denoise: Denoise,
    scheduler: NoiseScheduler,
    noise_BChw: Tensor,
    text: TextFeatures,
    null: TextFeatures,
    *,
    steps: int,
    guidance: float,
    dtype: torch.dtype = torch.float32,
    start_BChw: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Denoise latents with classifier-free guidance: prediction = eps_null + guidance * (eps_text - eps_null).

    Args:
        denoise: function (latents [B, C, h, w], timesteps [B], text features) -> prediction (`denoiser`).
        scheduler: a scheduler of diffusers (`model.diffusion.make_scheduler`).
        noise_BChw: initial noise, float32, on the device of the model.
        text: outputs of the text encoder for B captions.
        null: outputs of the text encoder for B negative captions, or for one negative caption that all images use.
        steps: number of denoising steps.
        guidance: guidance scale; 1 turns guidance off.
        dtype: dtype of the model's weights.
        start_BChw: latents of images to start from. None: start from noise.
        strength: share of the steps, 0 to 1, that are applied to `start_BChw`.

    Returns:
        Latents, float32 [B, C, h, w].
    """
    device, batch = noise_BChw.device, len(noise_BChw)
    captions = _to(text, device, dtype) if guidance == 1 else _both(text, null, batch, device, dtype)
    copies = len(captions.tokens) // batch
    scheduler.set_timesteps(steps)
    x, timesteps = first_latents(scheduler, noise_BChw, steps, start_BChw, strength)
    for t in timesteps:
        scaled = model_input(scheduler, x, t).to(dtype).repeat(copies, 1, 1, 1)
        timestep = torch.full((len(scaled),), t.item(), device=device)
        parts = denoise(scaled, timestep, captions).float().chunk(copies)
        prediction = parts[0] if copies == 1 else parts[1] + guidance * (parts[0] - parts[1])
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def first_latents(
    scheduler: NoiseScheduler, noise_BChw: Tensor, steps: int, start_BChw: Tensor | None, strength: float
) -> tuple[Tensor, Tensor]:
    """Return the latents with which the first step starts, [B, C, h, w], and the timesteps of the steps to run.

    With start images, the first part of the scheduler's timesteps is left out, and the returned latents are `start_BChw`
    with noise.

    Args:
        scheduler: a scheduler of diffusers after its `set_timesteps`.
        noise_BChw: initial noise.
        steps: number of denoising steps for which the timesteps were set.
        start_BChw: latents of images to start from. None: start from noise.
        strength: share of the steps, 0 to 1, that are applied to `start_BChw`.
    """
    timesteps = scheduler.timesteps
    if start_BChw is None:
        if late := late_start_warning(scheduler):
            _log.warning("%s", late)
        return noise_BChw * getattr(scheduler, "init_noise_sigma", 1.0), timesteps
    kept = min(int(steps * strength), steps)  # as in diffusers
    skipped = (steps - kept) * scheduler.order if kept else len(timesteps)  # PNDM has more timesteps than steps
    timesteps = timesteps[skipped:]
    if not len(timesteps):
        return start_BChw, timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return add_noise(scheduler, start_BChw, noise_BChw, timesteps[0]), timesteps


def add_noise(scheduler: NoiseScheduler, x_BChw: Tensor, noise_BChw: Tensor, timestep: Tensor) -> Tensor:
    """Mix clean latents `x_BChw` with `noise_BChw`, in the proportions that the scheduler has at its timestep `timestep`."""
    timestep_B = timestep.expand(len(x_BChw))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(x_BChw, timestep_B, noise_BChw)
    return scheduler.add_noise(x_BChw, noise_BChw, timestep_B)


def model_input(scheduler: NoiseScheduler, x: Tensor, timestep: Tensor) -> Tensor:
    """Return latents `x`, scaled as `scheduler` requires for the model's input. Schedulers of flow matching do not scale."""
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


def _to(text: TextFeatures, device: torch.device, dtype: torch.dtype) -> TextFeatures:
    return TextFeatures(text.tokens.to(device, dtype), text.mask.to(device), text.end.to(device))


def _both(text: TextFeatures, null: TextFeatures, batch: int, device: torch.device, dtype: torch.dtype) -> TextFeatures:
    """Join the features of `batch` captions (`text`) and of their negative captions (`null`) to one batch, in this order.

    The result is on `device`, and its tokens have the dtype `dtype`.
    """
    pairs = ((text.tokens, null.tokens), (text.mask, null.mask), (text.end, null.end))
    parts = [torch.cat([own.to(device), other.to(device).expand(batch, *other.shape[1:])]) for own, other in pairs]
    return _to(TextFeatures(*parts), device, dtype)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model with its encoders, which draws images.

    Attributes:
        model: the U-Net.
        text, image: the encoders.
        device: device of the latents, which are float32.
        dtype: dtype of the model's weights.
        upscale: the model's super-resolution settings.
    """

    model: nn.Module
    text: TextEncoder
    image: ImageEncoder
    device: torch.device
    dtype: torch.dtype
    upscale: Upscale

    @classmethod
    def of(cls, model: nn.Module, text: TextEncoder, image: ImageEncoder) -> "Sampler":
        """Return a sampler for the U-Net `model` and the encoders `text` and `image`, with device and dtype of the U-Net."""
        weight = next(model.parameters())
        return cls(model, text, image, weight.device, weight.dtype, cast(Upscale, model.upscale))

    def draw(
        self,
        requests: Sequence[Request],
        scheduler: NoiseScheduler,
        *,
        steps: int,
        guidance: float,
        strength: float = 0.8,
    ) -> np.ndarray:
        """Draw one image for each request. All images must have the same size, and either all or none have a start image.

        Args:
            requests: descriptions of B images: caption, size, seed, input images.
            scheduler: a scheduler of diffusers; its state is changed.
            steps: number of denoising steps.
            guidance: scale of classifier-free guidance; 1 turns guidance off.
            strength: share of the steps, 0 to 1, that are applied to start images; without effect if there are none.

        Returns:
            Images, uint8 [B, H, W, 3].
        """
        (size_hw,) = {request.size_hw for request in requests}
        shape = (self.image.channels, size_hw[0] // self.image.factor, size_hw[1] // self.image.factor)
        noise = torch.stack([initial_noise(r.seed, r.index, shape, r.copy) for r in requests]).to(self.device)
        captions = self.text.encode([r.prompt for r in requests])
        negatives = sorted({r.negative for r in requests})
        null = self.text.encode(negatives if len(negatives) == 1 else [r.negative for r in requests])
        latents = sample_latents(
            self._denoise(requests),
            scheduler,
            noise,
            captions,
            null,
            steps=steps,
            guidance=guidance,
            dtype=self.dtype,
            start_BChw=self._start(requests),
            strength=strength,
        )
        images = self.image.decode(latents)
        if self.upscale.factor:
            images = back_project(images, self._small(requests).to(images.device), self.upscale.back_projections)
        return to_pixels(images)

    def _denoise(self, requests: Sequence[Request]) -> Denoise:
        if self.upscale.factor or any(r.small is not None for r in requests):
            return denoiser(self.model, small_B3HsWs=self._small(requests))
        maps = [r.edges for r in requests if r.edges is not None]
        if not maps:
            return denoiser(self.model)
        if getattr(self.model, "control", None) is None:
            raise UserError(
                "--control requires a model with a ControlNet, but this model has none. Add `--control-from RUN_DIR` "
                "with the run that trained a ControlNet, or leave out --control."
            )
        if len(maps) < len(requests):
            raise UserError(
                f"--control requires an edge map for each image, but only {len(maps)} of {len(requests)} images have one. "
                "Give all images an edge map, or none."
            )
        edge_BHW = torch.from_numpy(np.stack(maps)).to(self.device)
        return denoiser(self.model, nn.functional.avg_pool2d(edge_BHW, self.image.factor))

    def _small(self, requests: Sequence[Request]) -> Tensor:
        for r in requests:
            check_small(self.upscale.factor, r.small, r.size_hw)
        return to_tensor(np.stack([r.small for r in requests if r.small is not None])).to(self.device)

    def _start(self, requests: Sequence[Request]) -> Tensor | None:
        images = [r.start for r in requests if r.start is not None]
        if not images:
            return None
        mean, _ = self.image.encode(to_tensor(np.stack(images)).to(self.device))
        return mean.to(self.device)


def check_small(factor: int, small_HsWs3: np.ndarray | None, size_hw: tuple[int, int], option: str = "--upscale") -> None:
    """Raise UserError unless the small input image has the size that the model requires to draw an image of `size_hw`.

    Args:
        factor: `upscale.factor` of the model; 0: it is not a super-resolution model, and a small image is not allowed.
        small_HsWs3: the small image; None: there is none.
        size_hw: height and width of the large image.
        option: name of the command line option, for messages.
    """
    if not factor:
        if small_HsWs3 is not None:
            raise UserError(
                f"{option} requires a super-resolution model, but upscale.factor of this model is 0. Leave out {option}."
            )
        return
    expected = f"{size_hw[0] // factor} x {size_hw[1] // factor} pixels (height x width)"
    enlarged = f"enlarged {factor} times to {size_hw[0]} x {size_hw[1]}"
    if small_HsWs3 is None:
        raise UserError(
            f"{option} is required, because the model enlarges images (upscale.factor={factor}). Give a small image of "
            f"{expected} for a large image of {size_hw[0]} x {size_hw[1]}."
        )
    height, width = small_HsWs3.shape[0] * factor, small_HsWs3.shape[1] * factor
    if (height, width) != tuple(size_hw):
        raise UserError(
            f"{option}: the small image must have {expected}, since it is {enlarged}, but it has {height // factor} x "
            f"{width // factor}. Resize it, or set the size of the large image: --size {height} {width}."
        )


def to_pixels(images_B3HW: Tensor) -> np.ndarray:
    """Convert images [B, 3, H, W] in -1..1 to uint8 [B, H, W, 3] on the CPU."""
    return ((images_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(pixels_BHW3: np.ndarray) -> Tensor:
    """Convert images, uint8 [B, H, W, 3], to float32 [B, 3, H, W] in -1..1 on the CPU."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1
