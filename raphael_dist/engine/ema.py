"""An exponential moving average of the weights, kept over the fp32 fragments that this rank owns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raphael_dist.config import Ema as EmaConfig
from raphael_dist.engine.fragments import Fragments


class Ema:
    """ema = decay * ema + (1 - decay) * weights after every optimizer step, in float32."""

    def __init__(self, fragments: Fragments, config: EmaConfig) -> None:
        self.values: list[Tensor] = [m.clone() for m in fragments.masters()]
        self._fragments, self._config = fragments, config

    def decay(self, step: int) -> float:
        """Return the decay after optimizer step `step` (from 1), with its warm-up."""
        target = self._config.decay
        return min(target, (1 + step) / (10 + step)) if self._config.warmup else target

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step `step`."""
        if self.values:
            torch._foreach_lerp_(self.values, self._fragments.masters(), 1 - self.decay(step))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Run the body with the averaged weights in the model, then put the exact weights back (a collective)."""
        kept = [m.clone() for m in self._fragments.masters()]
        _write(self._fragments, self.values)
        try:
            yield
        finally:
            _write(self._fragments, kept)


@torch.no_grad()
def _write(fragments: Fragments, values: list[Tensor]) -> None:
    for master, value in zip(fragments.masters(), values, strict=True):
        master.copy_(value)
    fragments.publish()
