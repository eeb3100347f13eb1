"""An exponential moving average of the weights.

Each rank averages the part of the fp32 weights that it stores under ZeRO (its fragments, see fragments.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raphael_dist.config.run_sections import EmaConfig
from raphael_dist.engine.fragments import Fragments

PIECE = 2**24  # elements that are swapped at a time: 64 MiB


class Ema:
    """The moving average of the weights: `ema = decay * ema + (1 - decay) * weights` after every optimizer step, in float32.

    A rank averages only those fp32 weights that it stores under ZeRO, its fragments.

    Attributes:
        values: the average of each fragment (this rank's part of a parameter), float32 [numel].
        flat: empty, unless the moving average was created with `flat=True`. Then a dict with the average of each tensor that
            the optimizer updates, in the same shape, by `id` of the tensor. `values` are views of these averages.
    """

    def __init__(self, fragments: Fragments, config: EmaConfig, flat: bool = False) -> None:
        """Start with the current weights.

        Args:
            fragments: this rank's part of the weights.
            config: the section `ema`.
            flat: whether to store the average in tensors shaped like those that the optimizer updates, which
                `adamw.FusedUpdate` requires.
        """
        self.flat: dict[int, Tensor] = {}
        if flat:
            self.flat = {id(owner): owner.detach().clone() for owner in fragments.owners}
            self.values = [self.flat[id(f.owner)].narrow(0, f.offset, f.numel) for f in fragments]
        else:
            self.values = [m.clone() for m in fragments.masters()]
        self._fragments, self._config = fragments, config

    @torch.no_grad()
    def restart(self) -> None:
        """Set the moving average to the current fp32 weights."""
        torch._foreach_copy_(self.values, self._fragments.masters())

    def decay(self, step: int) -> float:
        """Return the factor (0..1) on the old average in the update after optimizer step `step` (counted from 1).

        With `ema.warmup` the factor rises from about 0.2 to `ema.decay`. Otherwise it is `ema.decay` in every step.
        """
        target, step = self._config.decay, step - self._config.start_step
        return min(target, (1 + step) / (10 + step)) if self._config.warmup else target

    def share(self, step: int) -> float:
        """Return the factor (0..1) on the new weights in the update after optimizer step `step` (counted from 1).

        The factor is 1 up to step `ema.start_step`, so the average equals the weights; afterwards it is 1 - `decay(step)`.
        """
        return 1.0 if step <= self._config.start_step else 1 - self.decay(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the moving average with the current weights, those after optimizer step `step` (counted from 1)."""
        share = self.share(step)
        if self.values and share == 1:
            self.restart()
        elif self.values:
            torch._foreach_lerp_(self.values, self._fragments.masters(), share)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Return a context manager inside which the model has the averaged weights. Collective.

        At the end of the context the training weights are restored exactly.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap averaged weights and training weights in pieces, because a large model leaves no memory for a second copy."""
        for master, value in zip(self._fragments.masters(), self.values, strict=True):
            for exact, average in zip(master.split(PIECE), value.split(PIECE), strict=True):
                copy = exact.clone()
                exact.copy_(average)
                average.copy_(copy)
        self._fragments.sync_model()
