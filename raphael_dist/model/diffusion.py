"""The diffusion process and its loss (Sec. 3), with timesteps that depend on the sample position alone.

Shape legend: B samples, C latent channels, h and w latent height and width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael_dist.config import Diffusion
from raphael_dist.rng import Purpose, generator


def alphas_cumprod(config: Diffusion) -> Tensor:
    """Return abar_t for t = 0 .. T-1, float32 [T], computed in float64."""
    if config.schedule == "scaled_linear":
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64)
        betas = roots**2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, dim=0)
    return (zero_terminal_snr(abar) if config.zero_terminal_snr else abar).float()


def zero_terminal_snr(abar_T: Tensor) -> Tensor:
    """Shift and scale the roots of abar so that the last is 0 and the first stays (Lin et al., arXiv 2305.08891, Alg. 1)."""
    roots = abar_T.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


def make_scheduler(config: Diffusion, name: str) -> Any:
    """Return diffusers' scheduler "ddim", "dpm++" (DPM-Solver++) or "euler" for the training noise schedule.

    DDIM and Euler as Stable Diffusion has them: timesteps are whole and end at 1, which StableDiffusionPipeline insists on.
    """
    from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    common: dict[str, Any] = {
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.schedule,
        "prediction_type": config.prediction,
    }
    spacing = {"timestep_spacing": "leading", "steps_offset": 1} if name != "dpm++" else {}
    if config.zero_terminal_snr:  # sampling must begin where there is no signal, as training did
        common, spacing = {**common, "rescale_betas_zero_snr": True}, {"timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler(**common, **spacing, clip_sample=False, set_alpha_to_one=False)
    if name == "euler":
        return EulerDiscreteScheduler(**common, **spacing)
    return DPMSolverMultistepScheduler(**common, **spacing)


def starts_late(scheduler: Any) -> str | None:
    """Say that a scheduler whose timesteps are set begins far from pure noise, None where it does not.

    DDIM spaces its steps by whole timesteps from the low end, so that 600 of 1,000 begin at 600: such images come out flat.
    """
    first, total, steps = int(scheduler.timesteps[0]), scheduler.config.num_train_timesteps, len(scheduler.timesteps)
    if total - first <= max(2 * total / steps, total / 20):
        return None
    nearest = min((n for n in range(1, total) if total % n == 0), key=lambda n: abs(n - steps))
    return (
        f"{steps} sampling steps begin at timestep {first} of {total}, far from pure noise: take {nearest}, which divides "
        "it, or the scheduler dpm++"
    )


def draw_timestep(config: Diffusion, seed: int, position: int, global_batch: int, phase: int = 0) -> int:
    """Return the timestep of a sample position, uniform over 0 .. T-1.

    Stratified: the positions of one global batch fall into `global_batch` equal strata, dealt by a permutation that
    depends on (seed, step). Every topology draws the same, and a batch covers the range evenly; so does every run of
    consecutive positions within it, which is what the ranks that share experts get (`batch_plan`). phase: where in
    [0, global_batch) steps begin, which is 0 until a run changes its global batch.
    """
    uniform = generator(seed, Purpose.TIMESTEP, position).random()
    if config.stratified:
        step, index = divmod(position - phase, global_batch)
        stratum = _strata(seed, step, global_batch)[index]
        uniform = (stratum + uniform) / global_batch
    return min(int(uniform * config.num_timesteps), config.num_timesteps - 1)


def draw_offset(seed: int, position: int, channels: int) -> Tensor:
    """Return a number of unit deviation for each channel of a sample's latents, float32 [C, 1, 1] (recipe.offset_noise)."""
    drawn = generator(seed, Purpose.OFFSET, position).standard_normal((channels, 1, 1), dtype=np.float32)
    return torch.from_numpy(drawn)


@lru_cache(maxsize=4)
def _strata(seed: int, step: int, global_batch: int) -> np.ndarray:
    """Return the stratum of each index of a batch: of 2^k consecutive ones, each 2^-k of the range has one.

    A van der Corput sequence, scrambled at random (Owen 1995): every other index goes to the lower or upper half, at random
    which, and so on within the halves. Where halves are unequal a random turn makes every index uniform again; there alone
    consecutive indices may miss a range and meet its neighbour twice.
    """
    draw = generator(seed, Purpose.STRATA, step)
    strata = np.empty(global_batch, np.int64)
    strata[_scramble(np.arange(global_batch), iter(draw.random(2 * global_batch)))] = np.arange(global_batch)
    return strata


def _scramble(indices: np.ndarray, draws: Iterator[float]) -> np.ndarray:
    """Return indices by stratum."""
    size = len(indices)
    if size < 2:
        return indices
    halves = [_scramble(indices[first::2], draws) for first in (0, 1)]
    by_stratum = np.concatenate(halves[:: 1 if next(draws) < 0.5 else -1])
    return np.roll(by_stratum, int(next(draws) * size)) if size % 2 else by_stratum


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (the paper prints the two roots swapped)."""

    abar_T: Tensor
    prediction: str

    @classmethod
    def create(cls, config: Diffusion, device: torch.device | str = "cpu") -> "NoiseSchedule":
        return cls(alphas_cumprod(config).to(device), config.prediction)

    def _roots(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar_T[timestep_B].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0_BChw: Tensor, noise_BChw: Tensor, timestep_B: Tensor) -> Tensor:
        """Return x_t, float32 [B, C, h, w]."""
        signal, sigma = self._roots(timestep_B)
        return signal * x0_BChw + sigma * noise_BChw

    def target(self, x0_BChw: Tensor, noise_BChw: Tensor, timestep_B: Tensor) -> Tensor:
        """Return what the model predicts: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
        if self.prediction == "epsilon":
            return noise_BChw
        signal, sigma = self._roots(timestep_B)
        return signal * noise_BChw - sigma * x0_BChw


def min_snr_weight_B(abar_B: Tensor, gamma: float, prediction: str) -> Tensor:
    """Return min(SNR, gamma) / SNR for predicted noise, / (SNR + 1) for v, float32 [B] (arXiv 2303.09556, Sec. 3.4).

    SNR = abar / (1 - abar). In terms of abar nothing is divided by a signal of 0.
    """
    signal, noise = abar_B, 1 - abar_B
    if prediction == "epsilon":
        return torch.minimum(torch.ones_like(signal), gamma * noise / signal)
    return torch.minimum(signal, gamma * noise)


def denoise_loss_B(prediction_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """L_denoise = mean ||eps - D(x_t, t, y)||^2 (Sec. 3) per sample, float32 [B]."""
    return (prediction_BChw.float() - target_BChw).square().mean(dim=(1, 2, 3))
