"""`tools/bench.py space`: time of the implementations of the Space-MoE.

Before it measures a layer, it checks that all implementations give the same results.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.config.schema import load_config
from raphael_dist.model.moe import SPACE_BACKENDS, SpaceMoE
from raphael_dist.model.routing import space_weights_BYK
from raphael_dist.text import counted

BACKENDS = ("reference", *SPACE_BACKENDS)


@dataclass(frozen=True)
class SpaceCase:
    """The sizes of one Space-MoE layer and its micro-batch.

    Attributes:
        batch: number of samples.
        tokens, text_tokens: number of image tokens and of text tokens per sample.
        dim, hidden: width of a token, and hidden width of an expert.
        experts: number of experts.
    """

    batch: int
    tokens: int
    text_tokens: int
    dim: int
    hidden: int
    experts: int

    def inputs(
        self, mask: float, device: str, dtype: torch.dtype, seed: int = 0, uneven: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return random inputs of the layer: image tokens [B, N, D], regions [B, N, Y] and routing [B, Y, K].

        Args:
            mask: share of the image (0..1) in the region of each text token.
            device: device of the tensors.
            dtype: their dtype.
            seed: seed of their random values.
            uneven: whether half of the text tokens are routed to expert 0.
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
    """Results for one size of the regions, the image parts that belong to text tokens.

    Attributes:
        mask: share of the image (0..1) in a region.
        density: share (0..1) of all (image token, expert) pairs in which the expert has a weight above 0 for the token.
        milliseconds: time of forward and backward, by implementation.
    """

    mask: float
    density: float
    milliseconds: dict[str, float]


def bench_space(
    case: SpaceCase, masks: Sequence[float], repeats: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[SpaceRow]:
    """Time forward and backward of each implementation of the Space-MoE; yield a row for each size of the regions.

    Args:
        case: sizes of the layer.
        masks: shares of the image (0..1) in the region of a text token.
        repeats: number of measurements of each implementation; the median counts.

    Raises:
        AssertionError: the outputs of two implementations differ.
    """
    layer = SpaceMoE(case.experts, case.dim, case.hidden, "reference", seed=0).to(device, dtype)
    for mask in masks:
        inputs = case.inputs(mask, device, dtype)
        with torch.no_grad():
            outputs = {backend: _forward(layer, backend, inputs) for backend in BACKENDS}
        reference, used_BK = outputs["reference"]
        tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * float(reference.abs().max())
        for backend, (out, _) in outputs.items():
            assert (out - reference).abs().max() <= tolerance, f"{backend} differs from the formula of Sec. 3.1"
        times: dict[str, float] = {b: median_ms(lambda b=b, i=inputs: _step(layer, b, i), repeats, device) for b in BACKENDS}  # type: ignore[misc]
        yield SpaceRow(mask, float(used_BK.mean()), times)


def _forward(layer: SpaceMoE, backend: str, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    layer.backend = backend
    return layer(*inputs)


def _step(layer: SpaceMoE, backend: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    h_BND, _, weight_BYK = inputs
    out, _ = _forward(layer, backend, inputs)
    torch.autograd.grad(out.float().square().sum(), [h_BND, weight_BYK, *layer.parameters()])


def median_ms(fn: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Return the median wall-clock milliseconds of `repeats` calls of `fn`, after one call that is not counted."""
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


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    add_sizes(command, 4, [0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default float32)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def add_sizes(command: argparse.ArgumentParser, batch: int, masks: list[float]) -> None:
    """Add the options that set the sizes of a Space-MoE layer and how it is measured. `batch`, `masks`: defaults."""
    for name, default, what in (
        ("batch", batch, "number of samples"),
        ("tokens", 256, "number of image tokens"),
        ("text-tokens", 77, "number of text tokens"),
        ("dim", 128, "width of a token"),
        ("experts", 6, "number of experts"),
        ("repeats", 7, "measurements, of which the median counts"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    command.add_argument("--config", help="use the sizes of the U-Net levels with attention of this preset")
    command.add_argument(
        "--latent", type=int, default=16, help="with --config: height and width of the latents (default 16)"
    )
    command.add_argument("--hidden", type=int, help="hidden width of an expert (default: 4 x --dim)")
    command.add_argument("--masks", type=float, nargs="+", default=masks, help="shares of the image in a token's region")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")


def cases(args: argparse.Namespace) -> list[SpaceCase]:
    """Return the sizes (tokens, widths, experts) of the Space-MoE layers to time.

    Without --config this is one layer, given by the other options. With it, one for each U-Net level that has attention.
    """
    if args.config is None:
        return [SpaceCase(args.batch, args.tokens, args.text_tokens, args.dim, args.hidden or 4 * args.dim, args.experts)]
    config = load_config(args.config)
    m, cases = config.model, []
    for level, (dim, hidden) in enumerate(zip(m.channels, m.expert_width, strict=True)):
        if m.attention[level]:
            tokens = (args.latent // 2**level) ** 2
            cases.append(
                SpaceCase(config.train.micro_batch_size, tokens, config.text.max_tokens, dim, hidden, m.space_experts)
            )
    return cases


def run(args: argparse.Namespace) -> None:
    """Print the time of each implementation of the Space-MoE for several sizes of the regions.

    A time covers a forward and a backward pass together. The region of a text token is the set of image tokens that its
    expert processes.
    """
    torch.set_num_threads(args.threads)
    for case in cases(args):
        print(f"{case}, {args.dtype} on {args.device}, {counted(args.threads, 'thread')}, median of {args.repeats}")
        print("mask = share of image tokens in a text token's region; density = share of (image token, expert) pairs in use")
        print("  mask  density" + "".join(f"{b:>9} ms" for b in BACKENDS) + "".join(f"{b:>9} x" for b in SPACE_BACKENDS))
        for row in bench_space(case, args.masks, args.repeats, args.device, getattr(torch, args.dtype)):
            ms = row.milliseconds
            times = "".join(f"{ms[b]:12.2f}" for b in BACKENDS)
            print(
                f"{row.mask:6.2f} {row.density:8.2f}{times}"
                + "".join(f"{ms['reference'] / ms[b]:11.1f}" for b in SPACE_BACKENDS)
            )
