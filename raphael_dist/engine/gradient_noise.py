"""Noise on the gradients (`recipe.gradient_noise`), the same on any number of ranks and after every resume."""

from functools import partial

import torch
from torch import Tensor, nn

from raphael_dist.engine.zero import global_shape
from raphael_dist.rng import Purpose, generator

GAMMA = 0.55


def deviation(eta: float, step: int) -> float:
    """Return sigma_t = sqrt(eta / (1 + t)^0.55) of optimizer step t, from 1 (Neelakantan et al., arXiv 1511.06807)."""
    return float((eta / (1 + step) ** GAMMA) ** 0.5)


class GradientNoise:
    """Adds noise to each parameter's gradient on its way out of a backward pass.

    Every rank adds the same to what it holds, so that the mean over ranks has it once. `step`: the optimizer step whose last
    backward pass is being run, 0 in others.
    """

    def __init__(self, model: nn.Module, eta: float, seed: int) -> None:
        self._eta, self._seed, self.step = eta, seed, 0
        for number, (_, p) in enumerate(model.named_parameters()):
            if not p.requires_grad:
                continue
            shape, first = global_shape(p)
            # DeepSpeed divides by all ranks, and of experts sums over those alone that hold the same ones.
            sets = shape[0] // len(p) if hasattr(p, "expert_slice") else 1
            p.register_hook(partial(self._noisy, number, shape, first, float(sets)))

    def _noisy(self, number: int, shape: tuple[int, ...], first: int, factor: float, gradient: Tensor) -> Tensor:
        if self.step == 0:
            return gradient
        noise = factor * deviation(self._eta, self.step) * self._draw(number, shape, first, gradient)
        return gradient + noise.to(gradient.dtype)

    def _draw(self, number: int, shape: tuple[int, ...], first: int, like: Tensor) -> Tensor:
        # The seed of torch's own generator, which works on the device, from ours.
        seed = int(generator(self._seed, Purpose.GRADIENT, self.step, extra=number).integers(2**63))
        draw = torch.Generator(like.device).manual_seed(seed)
        whole = torch.randn(torch.Size(shape).numel(), generator=draw, device=like.device)
        return whole[first : first + like.numel()].view_as(like)
