"""The denoising loss at fixed noise, by timestep.

Shape legend: P pictures, T timesteps.
"""

from collections.abc import Sequence

import numpy as np
import torch

from raphael_dist.model.diffusion import NoiseSchedule, denoise_loss_B
from raphael_dist.rng import Purpose, generator
from raphael_dist.sampling.load import Trained
from raphael_dist.sampling.sampling import to_tensor

TIMESTEPS = tuple(range(50, 1000, 100))
_FIRST = 1_000_000  # of the streams of noise, apart from those that samples start from


@torch.no_grad()
def losses(trained: Trained, pixels: Sequence[np.ndarray], captions: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    """Return L_denoise of each picture, uint8 [H, W, 3], at each of TIMESTEPS, float64 [P, T].

    `numbers` fix each picture's noise, which is another at every timestep; latents are the means of the encoder.
    """
    schedule = NoiseSchedule.create(trained.config.diffusion, trained.sampler.device)
    return np.array([_of_picture(trained, schedule, *one) for one in zip(pixels, captions, numbers, strict=True)])


def _of_picture(trained: Trained, schedule: NoiseSchedule, pixels: np.ndarray, caption: str, number: int) -> list[float]:
    s, count = trained.sampler, len(TIMESTEPS)
    last = trained.config.diffusion.num_timesteps
    timestep_T = torch.tensor([t * last // 1000 for t in TIMESTEPS], device=s.device)
    x0 = s.image.encode(to_tensor(pixels[None]).to(s.device))[0].to(s.device).expand(count, -1, -1, -1)
    draws = [generator(0, Purpose.NOISE, number, extra=_FIRST + t) for t in TIMESTEPS]
    noise = torch.stack([torch.from_numpy(d.standard_normal(tuple(x0.shape[1:]), dtype=np.float32)) for d in draws])
    noise = noise.to(s.device)
    text = s.text.encode([caption])
    tokens = text.tokens.to(s.device, s.dtype).expand(count, -1, -1)
    mask, end = text.mask.to(s.device).expand(count, -1), text.end.to(s.device).expand(count)
    out = trained.model(schedule.add_noise(x0, noise, timestep_T).to(s.dtype), timestep_T, tokens, mask, end)
    return denoise_loss_B(out.prediction, schedule.target(x0, noise, timestep_T)).double().tolist()
