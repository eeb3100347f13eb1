"""Denoising loss of held-out images at fixed timesteps and fixed noise.

Shape legend: P images, T timesteps.
"""

from collections.abc import Sequence

import numpy as np
import torch

from raphael_dist.model.diffusion import NoiseSchedule, denoise_loss_B
from raphael_dist.rng import Purpose, generator
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.sampler import to_tensor

TIMESTEPS = tuple(range(50, 1000, 100))
_FIRST_STREAM = 1_000_000  # keeps these noise streams apart from those that sampling starts from


@torch.no_grad()
def timestep_losses(
    trained: TrainedModel, pixels: Sequence[np.ndarray], captions: Sequence[str], numbers: Sequence[int]
) -> np.ndarray:
    """Return the denoising loss of P images at each of the T timesteps TIMESTEPS, float64 [P, T].

    Args:
        trained: the model.
        pixels: images, uint8 [H, W, 3]; latents are the means of the encoder.
        captions: caption of each image.
        numbers: number of each image, the seed of its noise. The noise also differs between timesteps.
    """
    schedule = NoiseSchedule.create(trained.config.diffusion, trained.sampler.device)
    rows = [_image_losses(trained, schedule, *image) for image in zip(pixels, captions, numbers, strict=True)]
    return np.array(rows)


def _image_losses(
    trained: TrainedModel, schedule: NoiseSchedule, pixels: np.ndarray, caption: str, number: int
) -> list[float]:
    s, count = trained.sampler, len(TIMESTEPS)
    last = trained.config.diffusion.num_timesteps
    timestep_T = torch.tensor([t * last // 1000 for t in TIMESTEPS], device=s.device)
    x0 = s.image.encode(to_tensor(pixels[None]).to(s.device))[0].to(s.device).expand(count, -1, -1, -1)
    draws = [generator(0, Purpose.NOISE, number, extra=_FIRST_STREAM + t) for t in TIMESTEPS]
    noise = torch.stack([torch.from_numpy(d.standard_normal(tuple(x0.shape[1:]), dtype=np.float32)) for d in draws])
    noise = noise.to(s.device)
    text = s.text.encode([caption])
    tokens = text.tokens.to(s.device, s.dtype).expand(count, -1, -1)
    mask, end = text.mask.to(s.device).expand(count, -1), text.end.to(s.device).expand(count)
    out = trained.model(schedule.add_noise(x0, noise, timestep_T).to(s.dtype), timestep_T, tokens, mask, end)
    return denoise_loss_B(out.prediction, schedule.target(x0, noise, timestep_T)).double().tolist()
