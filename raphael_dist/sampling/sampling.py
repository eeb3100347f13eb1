"""From prompts to images: guidance around diffusers' schedulers, from noise or from a picture.

Shape legend: B images, C latent channels, h and w latent height and width, H and W image height and width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from raphael_dist.config_upscale import Upscale
from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import starts_late
from raphael_dist.model.upscale import back_project, beside_latents
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
_NONE = Upscale()
# What the U-Net predicts for noised latents [B, C, h, w], timesteps [B] and captions.
Denoise = Callable[[Tensor, Tensor, TextFeatures], Tensor]
# Called after each step with its number, its timestep and the latents; what it returns replaces them.
OnStep = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """One image to draw. `seed`, `index` and `copy` fix its noise, so that it is the same in any batch and on any rank.

    index: the number of the prompt within its set. copy: the number among the images of one prompt. start: a picture to
    begin from, uint8 [H, W, 3] of size `size_hw`, or None to begin from noise. edges: a map to follow, float32 [H, W] in
    0..1, for a model with a control, or None. small: a small picture to enlarge, uint8 [Hs, Ws, 3], for a model of
    super-resolution, or None.
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


def initial_noise(seed: int, index: int, shape: tuple[int, ...], copy: int = 0) -> Tensor:
    """Return the noise, float32, that image `copy` of prompt number `index` starts from: the same in any batch, anywhere."""
    draw = generator(seed, Purpose.NOISE, index, extra=1 + copy)
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def denoiser(model: nn.Module, edge_Bhw: Tensor | None = None) -> Denoise:
    """Return the prediction of a `RaphaelUNet` as a function of captions; edge_Bhw: maps for its control."""

    def denoise(x: Tensor, timestep: Tensor, text: TextFeatures) -> Tensor:
        # Captions and negative ones lie one after the other, and follow the same maps.
        edges = [] if edge_Bhw is None else [None, edge_Bhw.repeat(len(x) // len(edge_Bhw), 1, 1)]
        prediction: Tensor = model(x, timestep, text.tokens, text.mask, text.end, *edges).prediction
        return prediction

    return denoise


def enlarging(denoise: Denoise, small_B3HsWs: Tensor, patch: int) -> Denoise:
    """Return the prediction of a model that sees small pictures, in -1..1, as a function of captions (model/upscale.py)."""

    def seeing(x: Tensor, timestep: Tensor, text: TextFeatures) -> Tensor:
        # Captions and negative ones lie one after the other, and see the same pictures.
        small = small_B3HsWs.repeat(len(x) // len(small_B3HsWs), 1, 1, 1)
        return denoise(beside_latents(x, small, patch), timestep, text)

    return seeing


@torch.no_grad()
def sample_latents(
    denoise: Denoise,
    scheduler: Any,
    noise_BChw: Tensor,
    text: TextFeatures,
    null: TextFeatures,
    *,
    steps: int,
    guidance: float,
    dtype: torch.dtype = torch.float32,
    start_BChw: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise with classifier-free guidance: eps_null + guidance * (eps_text - eps_null).

    Args:
        scheduler: one of diffusers' (`model.diffusion.make_scheduler`); its noise scale and input scaling are honoured.
        noise_BChw: float32, on the device that computes. text: B captions; null: B negative ones, or one for all.
        steps: denoising steps. guidance: 1 leaves `null` out. dtype: of the model's weights. Gates get no noise.
        start_BChw: latents of pictures, of which the share `strength` in 0..1 of the steps is drawn anew; None: from noise.

    Returns float32 latents [B, C, h, w].
    """
    device, batch = noise_BChw.device, len(noise_BChw)
    captions = _on(text, device, dtype) if guidance == 1 else _both(text, null, batch, device, dtype)
    copies = len(captions.tokens) // batch
    x, timesteps = _begin(scheduler, noise_BChw, steps, start_BChw, strength)
    for number, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t).to(dtype).repeat(copies, 1, 1, 1)
        timestep = torch.full((len(scaled),), t.item(), device=device)
        parts = denoise(scaled, timestep, captions).float().chunk(copies)
        prediction = parts[0] if copies == 1 else parts[1] + guidance * (parts[0] - parts[1])
        x = scheduler.step(prediction, t, x).prev_sample
        if on_step is not None:
            x = on_step(number, t, x)
    return x


def _begin(
    scheduler: Any, noise: Tensor, steps: int, start: Tensor | None, strength: float
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return what the first step denoises, and the timesteps to go."""
    scheduler.set_timesteps(steps)
    if start is None:
        if late := starts_late(scheduler):
            _log.warning("%s", late)
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    skipped = steps - min(int(steps * strength), steps)  # as diffusers counts
    timesteps = scheduler.timesteps[skipped:]
    if not len(timesteps):
        return start, timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.add_noise(start, noise, timesteps[:1].expand(len(start))), timesteps


def _on(text: TextFeatures, device: torch.device, dtype: torch.dtype) -> TextFeatures:
    return TextFeatures(text.tokens.to(device, dtype), text.mask.to(device), text.end.to(device))


def _both(text: TextFeatures, null: TextFeatures, batch: int, device: torch.device, dtype: torch.dtype) -> TextFeatures:
    def joined(name: str) -> Tensor:
        own, other = getattr(text, name).to(device), getattr(null, name).to(device)
        return torch.cat([own, other.expand(batch, *other.shape[1:])])

    return _on(TextFeatures(joined("tokens"), joined("mask"), joined("end")), device, dtype)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model with its encoders, ready to draw. `dtype`: of the model's weights; latents are float32 on `device`."""

    denoise: Denoise
    text: TextEncoder
    image: ImageEncoder
    device: torch.device
    dtype: torch.dtype = torch.float32
    following: Callable[[Tensor], Denoise] | None = None  # maps for the model's control, if it has one
    upscale: Upscale = _NONE  # of the model

    @classmethod
    def of(cls, model: nn.Module, text: TextEncoder, image: ImageEncoder) -> "Sampler":
        """Return the sampler of a `RaphaelUNet`, on its device and in its type."""
        weight = next(model.parameters())
        following = partial(denoiser, model) if getattr(model, "control", None) is not None else None
        upscale = cast(Upscale, model.upscale)
        return cls(denoiser(model), text, image, weight.device, weight.dtype, following, upscale)

    def draw(
        self,
        requests: Sequence[Request],
        scheduler: Any,
        *,
        steps: int,
        guidance: float,
        strength: float = 0.8,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Return images, uint8 [B, H, W, 3], of requests of one size, all with a picture to start from or none."""
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
            on_step=on_step,
        )
        images = self.image.decode(latents)
        if self.upscale.factor:
            images = back_project(images, self._small(requests).to(images.device), self.upscale.back_projections)
        return to_pixels(images)

    def _denoise(self, requests: Sequence[Request]) -> Denoise:
        if self.upscale.factor or any(r.small is not None for r in requests):
            return enlarging(self.denoise, self._small(requests), self.upscale.patch)
        maps = [r.edges for r in requests if r.edges is not None]
        if not maps:
            return self.denoise
        if self.following is None or len(maps) < len(requests):
            raise UserError("--control: all pictures of a batch follow a map or none does, and the model needs a control")
        edge_BHW = torch.from_numpy(np.stack(maps)).to(self.device)
        return self.following(nn.functional.avg_pool2d(edge_BHW, self.image.factor))

    def _small(self, requests: Sequence[Request]) -> Tensor:
        for r in requests:
            check_small(self.upscale, r.small, r.size_hw)
        return to_tensor(np.stack([r.small for r in requests if r.small is not None])).to(self.device)

    def _start(self, requests: Sequence[Request]) -> Tensor | None:
        pictures = [r.start for r in requests if r.start is not None]
        if not pictures:
            return None
        mean, _ = self.image.encode(to_tensor(np.stack(pictures)).to(self.device))
        return mean.to(self.device)


def check_small(
    upscale: Upscale, small_HsWs3: np.ndarray | None, size_hw: tuple[int, int], option: str = "--upscale"
) -> None:
    """Raise UserError where a model cannot draw a picture of a size from a small one (None: from the caption alone)."""
    factor, large = upscale.factor, f"a picture of {size_hw[0]} x {size_hw[1]}"
    if not factor:
        if small_HsWs3 is not None:
            raise UserError(f"{option}: this model draws from captions alone (upscale.factor = 0); give one that enlarges")
        return
    wanted = f"{size_hw[0] // factor} x {size_hw[1] // factor}"
    if small_HsWs3 is None:
        raise UserError(
            f"{option}: none given, but this model enlarges small pictures (upscale.factor = {factor}); give one of {wanted}"
            f" pixels for {large}"
        )
    height, width = upscale.picture_hw((small_HsWs3.shape[0], small_HsWs3.shape[1]))
    if (height, width) != tuple(size_hw):
        raise UserError(
            f"{option}: given {height // factor} x {width // factor} pixels, must be {wanted} for {large}; scale it, or ask "
            f"for {height} x {width} (--size)"
        )


def to_pixels(images_B3HW: Tensor) -> np.ndarray:
    """Return uint8 [B, H, W, 3] of images in [-1, 1]."""
    return ((images_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(pixels_BHW3: np.ndarray) -> Tensor:
    """Return float32 [B, 3, H, W] in [-1, 1] of uint8 images."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1
