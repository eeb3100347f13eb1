"""The diffusion process and its loss (Sec. 3). A sample's timestep is computed from its position in the order of training.

Legend: B samples, C latent channels, h and w latent height and width, T timesteps; abar_t is the share of the signal's
variance in the noised latents x_t.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael_dist.config.model_sections import Diffusion
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

NoiseScheduler = Any  # a scheduler of diffusers; their base class has none of the methods


def alphas_cumprod(config: Diffusion) -> Tensor:
    """Return abar_t, the product of 1 - beta up to timestep t, for all timesteps t = 0 .. T-1, float32 [T].

    abar_t is the share of the signal's variance in latents noised to timestep t. It is computed in float64. `config` is the
    section `diffusion`, which states T and the betas.
    """
    if config.schedule == "scaled_linear":
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64)
        betas = roots**2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, dim=0)
    return (zero_terminal_snr(abar) if config.zero_terminal_snr else abar).float()


def zero_terminal_snr(abar_T: Tensor) -> Tensor:
    """Rescale a noise schedule so that its last timestep is pure noise (Alg. 1 of arXiv 2305.08891).

    `abar_T`: for each of T timesteps, the cumulative product of (1 - beta). Its square root is shifted and scaled: the last
    value becomes 0, the first is unchanged. Returns the new abar [T].
    """
    roots = abar_T.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


def make_scheduler(config: Diffusion, name: str) -> NoiseScheduler:
    """Return a scheduler of diffusers that samples with the noise schedule of training.

    For noise and v prediction, DDIM and Euler use the timesteps of Stable Diffusion: integers, the last of which is 1, as
    StableDiffusionPipeline requires. If diffusion.zero_terminal_snr is True, all schedulers instead space the timesteps so
    that the first is the noisiest one.

    Args:
        config: the section `diffusion`, with the noise schedule.
        name: "ddim", "dpm++" (DPM-Solver++) or "euler". With diffusion.prediction=flow, "ddim" is the same as "euler".

    Raises:
        UserError: `name` is "dpm++" and diffusion.prediction is flow.
    """
    from diffusers.schedulers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    if config.prediction == "flow":
        if name == "dpm++":
            raise UserError("--scheduler=dpm++ is incompatible with diffusion.prediction=flow. Use euler.")
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_timesteps)  # type: ignore[no-untyped-call]
    common: dict[str, float | str] = {
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.schedule,
        "prediction_type": config.prediction,
    }
    spacing = {"timestep_spacing": "leading", "steps_offset": 1} if name != "dpm++" else {}
    if config.zero_terminal_snr:  # sampling must start at pure noise, as training did
        common, spacing = {**common, "rescale_betas_zero_snr": True}, {"timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler(  # type: ignore[no-untyped-call]
            **common, **spacing, clip_sample=False, set_alpha_to_one=False
        )
    scheduler = EulerDiscreteScheduler if name == "euler" else DPMSolverMultistepScheduler
    return scheduler(**common, **spacing)


def late_start_warning(scheduler: NoiseScheduler) -> str | None:
    """Return a warning if the first sampling step starts far from pure noise, else None.

    The timesteps of DDIM and Euler are 1, 1 + d, 1 + 2 d, ..., where the distance d is a whole number. For example, with
    1,000 training timesteps and 600 sampling steps, d is 1. Sampling then starts at timestep 600, and the images get little
    contrast.

    `scheduler`: a scheduler of diffusers after its `set_timesteps`.
    """
    first, total, steps = int(scheduler.timesteps[0]), scheduler.config.num_train_timesteps, len(scheduler.timesteps)
    if total - first <= max(2 * total / steps, total / 20):
        return None
    nearest = min((n for n in range(1, total) if total % n == 0), key=lambda n: abs(n - steps))
    return (
        f"{steps} sampling steps start at timestep {first} of {total}, far from pure noise. Use {nearest} steps, a divisor "
        f"of {total}, or the scheduler dpm++."
    )


def draw_timestep(config: Diffusion, seed: int, position: int, global_batch_size: int, phase: int = 0) -> int:
    """Return the diffusion timestep of a training sample, drawn uniformly from 0 .. `config.num_timesteps` - 1.

    With diffusion.stratified, the range is divided into `global_batch_size` equal strata (subranges). Each sample of a
    global batch gets its own stratum, in an order that depends on `seed` and the step. So the timesteps of a batch cover the
    range evenly. The timesteps of any consecutive samples of a batch also cover the range evenly, which balances the load of
    ranks that share experts. The result does not depend on the number of ranks.

    Args:
        config: the section `diffusion`.
        seed: `run.seed`.
        position: number of the sample in the order of training, counted through all epochs.
        global_batch_size: samples per step.
        phase: position of a step's first sample modulo `global_batch_size`. It is 0 unless the global batch size was
            changed in the course of the run.
    """
    uniform = generator(seed, Purpose.TIMESTEP, position).random()
    if config.stratified:
        step, index = divmod(position - phase, global_batch_size)
        stratum = _strata(seed, step, global_batch_size)[index]
        uniform = (stratum + uniform) / global_batch_size
    return min(int(uniform * config.num_timesteps), config.num_timesteps - 1)


def draw_offset(seed: int, position: int, channels: int) -> Tensor:
    """Return the offset noise of a training sample: one standard normal number per latent channel, float32 [C, 1, 1].

    The caller multiplies the offset by `diffusion.offset_noise` and adds it to the noise at every position of the latents.

    Args:
        seed: `run.seed`.
        position: number of the sample in the order of training.
        channels: number of latent channels, C.
    """
    drawn = generator(seed, Purpose.OFFSET, position).standard_normal((channels, 1, 1), dtype=np.float32)
    return torch.from_numpy(drawn)


@lru_cache(maxsize=4)
def _strata(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """Return the stratum (number of a subrange) of each sample of a global batch, int64 [global_batch_size].

    If the strata are divided into 2^k equal ranges, any 2^k consecutive samples are in different ranges, provided that 2^k
    divides `global_batch_size`. This is a randomly scrambled van der Corput sequence (Owen 1995): samples 0, 2, 4, ... go to
    one half of the strata, chosen at random, and samples 1, 3, 5, ... to the other half. Each half is divided again in the
    same way. If the number of samples to divide is odd, their order is then shifted cyclically by a random number, so that
    each stratum is equally likely. The random choices depend on `seed` (run.seed) and `step`.
    """
    draw = generator(seed, Purpose.STRATA, step)
    strata = np.empty(global_batch_size, np.int64)
    strata[_scramble(np.arange(global_batch_size), iter(draw.random(2 * global_batch_size)))] = np.arange(global_batch_size)
    return strata


def _scramble(indices: np.ndarray, draws: Iterator[float]) -> np.ndarray:
    """Return samples in scrambled order: the first of the result gets the lowest stratum, and so on (see `_strata`).

    `indices`: numbers of the samples, int64 [n]. `draws`: random numbers in 0..1, which decide the order.
    """
    size = len(indices)
    if size < 2:
        return indices
    halves = [_scramble(indices[first::2], draws) for first in (0, 1)]
    by_stratum = np.concatenate(halves[:: 1 if next(draws) < 0.5 else -1])
    return np.roll(by_stratum, int(next(draws) * size)) if size % 2 else by_stratum


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (the paper prints the two roots swapped).

    x_0 are clean latents, x_t the latents noised to timestep t, eps is standard normal noise.

    Attributes:
        abar_T: for each of T timesteps, the cumulative product of (1 - beta), float32 [T].
        prediction: what the model predicts, "epsilon", "v_prediction" or "flow".
    """

    abar_T: Tensor
    prediction: str

    @classmethod
    def create(cls, config: Diffusion, device: torch.device | str = "cpu") -> "NoiseSchedule":
        """Return the noise schedule of the section `diffusion`; a FlowSchedule if diffusion.prediction is flow.

        `device`: the device on which the schedule stores `abar_T`.
        """
        kind = FlowSchedule if config.prediction == "flow" else cls
        return kind(alphas_cumprod(config).to(device), config.prediction)

    def _roots(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar_T[timestep_B].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0_BChw: Tensor, noise_BChw: Tensor, timestep_B: Tensor) -> Tensor:
        """Return the noised latents x_t of each sample at its timestep t, float32 [B, C, h, w].

        Args:
            x0_BChw: clean latents, float32.
            noise_BChw: standard normal noise, float32.
            timestep_B: timestep of each sample, int64, from 0 (least noise).
        """
        signal, sigma = self._roots(timestep_B)
        return signal * x0_BChw + sigma * noise_BChw

    def target(self, x0_BChw: Tensor, noise_BChw: Tensor, timestep_B: Tensor) -> Tensor:
        """Return what the model must predict from noised latents, float32 [B, C, h, w].

        For epsilon prediction, this is the noise eps. For v prediction, it is v = sqrt(abar) eps - sqrt(1 - abar) x_0.

        Args:
            x0_BChw: clean latents x_0, float32.
            noise_BChw: the noise eps that was added to them, float32.
            timestep_B: timestep of each sample, int64.
        """
        if self.prediction == "epsilon":
            return noise_BChw
        signal, sigma = self._roots(timestep_B)
        return signal * noise_BChw - sigma * x0_BChw


class FlowSchedule(NoiseSchedule):
    """The noise schedule of rectified flow (arXiv 2209.03003): x_t = (1 - sigma) x_0 + sigma eps with sigma = t / T.

    x_0 are clean latents, x_t the latents noised to timestep t of T, eps is standard normal noise.
    """

    def _roots(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timestep_B.float() / len(self.abar_T)).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def target(self, x0_BChw: Tensor, noise_BChw: Tensor, timestep_B: Tensor) -> Tensor:
        """Return what the model must predict: noise minus clean latents, float32 [B, C, h, w].

        This is the derivative of the noised latents with respect to the noise level sigma. `timestep_B` is not used.
        """
        return noise_BChw - x0_BChw


def min_snr_weight_B(abar_B: Tensor, gamma: float, prediction: str) -> Tensor:
    """Return the min-SNR weight of each sample's loss, float32 [B] (arXiv 2303.09556, Sec. 3.4).

    With SNR = abar / (1 - abar) the weight is min(SNR, gamma) / SNR if the model predicts the noise, and min(SNR, gamma) /
    (SNR + 1) if the model predicts v. It is computed from abar, so that the weight is defined for an SNR of 0, too.

    Args:
        abar_B: the noise schedule's cumulative product of (1 - beta) at each sample's timestep.
        gamma: `diffusion.min_snr_gamma`.
        prediction: what the model predicts, "epsilon" or "v_prediction".
    """
    signal, noise = abar_B, 1 - abar_B
    if prediction == "epsilon":
        return torch.minimum(torch.ones_like(signal), gamma * noise / signal)
    return torch.minimum(signal, gamma * noise)


def denoise_loss_B(prediction_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """Return each sample's denoising loss, the mean squared error of the model's prediction (Sec. 3), float32 [B].

    `prediction_BChw`: the output of the model. `target_BChw`: what the model should have predicted, e.g. the noise, float32.
    """
    return (prediction_BChw.float() - target_BChw).square().mean(dim=(1, 2, 3))
