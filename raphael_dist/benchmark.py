"""Cases and timing for tools/bench.py. Every case checks that what it compares agrees before it times anything.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.model.moe import SpaceBackend, SpaceMoE
from raphael_dist.model.routing import space_weights_BYK

BACKENDS: tuple[SpaceBackend, ...] = ("literal", "grouped", "wide")


@dataclass(frozen=True)
class SpaceCase:
    """The sizes of one Space-MoE layer and its micro-batch."""

    batch: int
    tokens: int
    text_tokens: int
    dim: int
    hidden: int
    experts: int

    def inputs(
        self, mask: float, device: str, dtype: torch.dtype, seed: int = 0, uneven: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return h [B, N, D], a mask [B, N, Y] with each region `mask` of the image, and random routing [B, Y, K].

        `uneven`: half of the text tokens want expert 0.
        """
        draw = torch.Generator().manual_seed(seed)
        h_BND = torch.randn(self.batch, self.tokens, self.dim, generator=draw)
        rank_BNY = torch.rand(self.batch, self.tokens, self.text_tokens, generator=draw).argsort(dim=1).argsort(dim=1)
        mask_BNY = (rank_BNY < max(1, round(mask * self.tokens))).float()
        chosen_BY = torch.randint(self.experts, (self.batch, self.text_tokens), generator=draw)
        if uneven:
            chosen_BY[:, : self.text_tokens // 2] = 0
        weight_BYK = space_weights_BYK(chosen_BY, torch.ones(chosen_BY.shape), self.experts, None)
        return h_BND.to(device, dtype).requires_grad_(), mask_BNY.to(device), weight_BYK.to(device).requires_grad_()


@dataclass(frozen=True)
class SpaceRow:
    """One line of the table: share of the image in a region, share of (token, expert) pairs in use, time per backend."""

    mask: float
    density: float
    milliseconds: dict[str, float]


def bench_space(
    case: SpaceCase, masks: Sequence[float], repeats: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[SpaceRow]:
    """Time forward and backward of the Space-MoE's three forms. Raises AssertionError where their outputs differ."""
    layer = SpaceMoE(case.experts, case.dim, case.hidden, "literal", seed=0).to(device, dtype)
    for mask in masks:
        inputs = case.inputs(mask, device, dtype)
        with torch.no_grad():
            outputs = {backend: _forward(layer, backend, inputs) for backend in BACKENDS}
        reference, used_BK = outputs["literal"]
        tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * float(reference.abs().max())
        for backend, (out, _) in outputs.items():
            assert (out - reference).abs().max() <= tolerance, f"{backend} differs from the formula of Sec. 3.1"
        times: dict[str, float] = {b: median_ms(lambda b=b, i=inputs: _step(layer, b, i), repeats, device) for b in BACKENDS}  # type: ignore[misc]
        yield SpaceRow(mask, float(used_BK.mean()), times)


def _forward(layer: SpaceMoE, backend: SpaceBackend, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    layer.backend = backend
    return layer(*inputs)


def _step(layer: SpaceMoE, backend: SpaceBackend, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    h_BND, _, weight_BYK = inputs
    out, _ = _forward(layer, backend, inputs)
    torch.autograd.grad(out.float().square().sum(), [h_BND, weight_BYK, *layer.parameters()])


def median_ms(fn: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Return the median wall-clock milliseconds of `fn`, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        fn()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
