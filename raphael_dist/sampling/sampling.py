"""From prompts to images: guidance, diffusers' schedulers, and the captioned grid."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures
from raphael_dist.model.diffusion import starts_late
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Return the noise, float32, that image number `index` of a set starts from: the same in any batch and on any device."""
    return torch.from_numpy(generator(seed, Purpose.NOISE, index, extra=1).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    scheduler: Any,
    noise_BChw: Tensor,
    text: TextFeatures,
    null: TextFeatures,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Denoise with classifier-free guidance: eps_null + guidance * (eps_text - eps_null).

    `noise_BChw` float32; `text` holds B encoded captions, `null` the empty one; `steps` denoising steps. Gates get no noise.
    Returns float32 latents [B, C, h, w] on the model's device.
    """
    weight = next(model.parameters())
    batch = noise_BChw.shape[0]
    scheduler.set_timesteps(steps)
    if late := starts_late(scheduler):
        _log.warning("%s", late)
    x = noise_BChw.to(weight.device) * scheduler.init_noise_sigma
    both = [_both(getattr(text, f), getattr(null, f), batch).to(weight.device) for f in ("tokens", "mask", "end")]
    tokens, mask, end = both[0].to(weight.dtype), both[1], both[2]
    for t in scheduler.timesteps:
        doubled = torch.cat([x, x]).to(weight.dtype)
        timestep = torch.full((2 * batch,), int(t), device=weight.device)
        conditional, unconditional = model(doubled, timestep, tokens, mask, end).prediction.float().chunk(2)
        x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x


def _both(text: Tensor, null: Tensor, batch: int) -> Tensor:
    return torch.cat([text, null.to(text.device).expand(batch, *null.shape[1:])])


def generate(
    model: nn.Module,
    text: TextEncoder,
    image: ImageEncoder,
    scheduler: Any,
    prompts: Sequence[str],
    indices: Sequence[int],
    *,
    size_hw: tuple[int, int],
    steps: int,
    guidance: float,
    seed: int,
) -> np.ndarray:
    """Return images, uint8 [B, H, W, 3], for `prompts`; `indices` number them within their set and fix their noise.

    `scheduler` is one of diffusers' (`model.diffusion.make_scheduler`).
    """
    shape = (image.channels, size_hw[0] // image.factor, size_hw[1] // image.factor)
    noise = torch.stack([initial_noise(seed, i, shape) for i in indices])
    captions, empty = text.encode(prompts), text.encode([""])
    latents = sample_latents(model, scheduler, noise, captions, empty, steps=steps, guidance=guidance)
    pixels = (image.decode(latents) + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def caption_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Lay images, uint8 [B, H, W, 3], out in up to six columns with their captions below, small ones enlarged."""
    count, height, width = images.shape[:3]
    columns, scale = min(6, count), max(1, 128 // width)
    cell_w, cell_h, text_h = width * scale + 12, height * scale + 44, 34
    grid = Image.new("RGB", (columns * cell_w, -(-count // columns) * cell_h), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * cell_w + 6, (i // columns) * cell_h + 4
        grid.paste(Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.BICUBIC), (x, y))
        for row, line in enumerate(_wrap(caption, draw, font, cell_w - 6)[: text_h // 14]):
            draw.text((x, y + height * scale + 3 + 14 * row), line, fill="black", font=font)
    return grid


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
