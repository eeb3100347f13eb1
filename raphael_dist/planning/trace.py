"""One micro-step of the model on tensors without data: every operation with its FLOPs, bytes and place, and live memory.

The model keeps its true widths and takes the ways of a GPU (wide space experts, the grouped product, fixed-size exchanges);
attention is the fused kernel's, whose shapes are the same on every device. Nothing is computed, so 3 B parameters take a
second. A micro-step is traced with two numbers of images; what an operation costs is a line through both, which gives every
other micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from raphael_dist.config import Config
from raphael_dist.config_upscale import COLOURS
from raphael_dist.model import experts
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.edge import EdgeModule
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.objective import compute_losses
from raphael_dist.model.residual import ResidualBlock
from raphael_dist.model.unet import GateNoise, RaphaelUNet
from raphael_dist.parallel.exchange import Traffic
from raphael_dist.planning.operations import CLASS_OF, POINTWISE, LiveBytes, flops_of, runs

Recompute = Literal["none", "blocks", "all"]
META = torch.device("meta")
KINDS = (
    "convolutions", "self-attention", "cross-attention", "time experts", "feed-forward", "space experts", "edge modules",
    "routing", "rest of blocks", "other",
)  # fmt: skip
PHASES = ("forward", "backward", "recomputed")
_OF_MODULE: dict[type[nn.Module], str] = {
    ResidualBlock: "convolutions",
    Downsample2D: "convolutions",
    Upsample2D: "convolutions",
    TimeMoE: "time experts",
    FeedForward: "feed-forward",
    SpaceMoE: "space experts",
    EdgeModule: "edge modules",
    TransformerBlock: "rest of blocks",
}
RECOMPUTE: tuple[Recompute, ...] = ("none", "blocks", "all")
SAMPLES = (2, 4)  # images of the two traces


@dataclass(frozen=True)
class Trace:
    """What one micro-step of `samples` images does on a rank, operation by operation, in order.

    kind, phase, sort: int64 [ops], indices into KINDS, PHASES and operations.CLASSES. flops, bytes: int64 [ops]; bytes are
    those of an operation's inputs and outputs by their shapes, as if nothing stayed in a cache. segment: int64 [ops], the
    part that can be recomputed to which an operation belongs (or in the backward pass, what it differentiates), else -1.
    in_block: bool [segments], whether a part is a transformer block (or a residual one). kept: int64 [segments], bytes
    that a part's forward pass leaves for its backward pass. peaks: int64 [2, segments + 1], the most bytes alive in the
    forward and in the backward pass while `i` parts have been begun, with gradients of weights let go as they are made, as
    ZeRO does.
    saved: bytes of activations alive after the forward pass. sent: bytes to other ranks' experts.
    """

    samples: int
    kind: NDArray[np.int64]
    phase: NDArray[np.int64]
    sort: NDArray[np.int64]
    segment: NDArray[np.int64]
    flops: NDArray[np.int64]
    bytes: NDArray[np.int64]
    in_block: NDArray[np.bool_]
    kept: NDArray[np.int64]
    peaks: NDArray[np.int64]
    saved: int
    sent: int

    @property
    def launches(self) -> int:
        return len(self.flops)

    @property
    def peak(self) -> int:
        """The most bytes of activations in the micro-step."""
        return int(self.peaks.max())

    def total(self, values: NDArray[np.int64], phase: str | None = None, kind: str | None = None) -> int:
        """Return the sum of `flops` or `bytes`, of one phase and kind or of all."""
        chosen = np.ones(len(values), dtype=bool)
        if phase is not None:
            chosen &= self.phase == PHASES.index(phase)
        if kind is not None:
            chosen &= self.kind == KINDS.index(kind)
        return int(values[chosen].sum())

    def recomputing(self, what: Recompute) -> "Trace":
        """Return the trace with some parts recomputed in the backward pass, of one that recomputes nothing.

        Their forward operations come again, and what they keep is there only while their own gradient is computed. The
        few last operations that recomputation can leave out are counted.
        """
        if what == "none":
            return self
        again = self.in_block | (what == "all")
        added = (self.phase == 0) & (self.segment >= 0)
        added[added] = again[self.segment[added]]

        def both(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.concatenate([values, values[added]])

        let_go = np.where(again, self.kept, 0)
        before = np.concatenate([[0], np.cumsum(let_go)])  # by all parts that ended before
        earlier = np.concatenate([[0], before[:-1]])  # the same, without the part itself, which is there again
        return replace(
            self,
            kind=both(self.kind),
            phase=np.concatenate([self.phase, np.full(added.sum(), PHASES.index("recomputed"))]),
            sort=both(self.sort),
            segment=both(self.segment),
            flops=both(self.flops),
            bytes=both(self.bytes),
            # A part that is recomputed is as full as in its forward pass, on top of what is alive before it.
            peaks=self.peaks - earlier,
            saved=self.saved - int(let_go.sum()),
        )


@dataclass(frozen=True)
class Profile:
    """A micro-step as a function of its images: a line through two traces."""

    few: Trace
    many: Trace

    def at(self, samples: int, recompute: Recompute = "none") -> Trace:
        """Return the trace of a micro-step of `samples` images."""
        share = (samples - self.few.samples) / (self.many.samples - self.few.samples)

        def line(name: str) -> NDArray[np.int64]:
            few, many = getattr(self.few, name), getattr(self.many, name)
            return np.rint(few + (many - few) * share).astype(np.int64)

        values = {name: line(name) for name in ("flops", "bytes", "kept", "peaks")}
        numbers = {name: int(line(name)) for name in ("saved", "sent")}
        return replace(self.few, samples=samples, **values, **numbers).recomputing(recompute)  # type: ignore[arg-type]


def profile(config: Config) -> Profile:
    """Return the profile of a configuration's micro-step on one rank without spread experts, nothing recomputed."""
    few, many = (trace(config, samples, "none") for samples in SAMPLES)
    assert few.launches == many.launches, "the number of images changed which operations run"
    return Profile(few, many)


def trace(
    config: Config,
    samples: int,
    recompute: Recompute | None = None,
    spread: Callable[[RaphaelUNet, int], Traffic] | None = None,
) -> Trace:
    """Trace one micro-step of `samples` images of the largest size in `image.buckets`.

    spread: puts layers of spread experts into the model, given the images, and returns their counter of bytes
    (`spread.stand_in`).
    """
    update = {} if recompute is None else {"checkpoint_activations": recompute}
    config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    dtype = getattr(torch, config.train.dtype)
    with META:
        model = RaphaelUNet(config).to(dtype)
    traffic = Traffic() if spread is None else spread(model, samples)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    notes = _Notes()
    schedule = NoiseSchedule.create(config.diffusion, META)
    batch = meta_batch(config, samples, model.num_blocks)
    with _stand_ins(), _kinds(model, notes), notes:
        losses = compute_losses(model, batch, schedule, config, dtype)
        saved, notes.phase = notes.live, "backward"
        losses.total.sum().backward()
    kind, phase, sort, segment, flops, num_bytes = (np.array(c, dtype=np.int64) for c in zip(*notes.rows, strict=True))
    return Trace(
        samples=samples,
        kind=kind,
        phase=phase,
        sort=sort,
        segment=segment,
        flops=flops,
        bytes=num_bytes,
        in_block=np.array([block for block, _ in notes.segments], dtype=bool),
        kept=np.array([kept for _, kept in notes.segments], dtype=np.int64),
        peaks=np.array([[peaks.get(i, 0) for i in range(len(notes.segments) + 1)] for peaks in notes.peaks]),
        saved=saved,
        sent=traffic.sent,
    )


class _Notes(LiveBytes):
    """Notes every operation that launches work: (kind, phase, class, segment, FLOPs, bytes), and memory by segment."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.phase = "forward"
        self.stack: list[str] = []  # kinds of the modules whose forward pass is running, outermost first
        self.segments: list[tuple[bool, int]] = []  # whether it is a block; bytes that its forward pass left
        self.peaks: tuple[dict[int, int], dict[int, int]] = {}, {}
        self.inside, self._begun = -1, 0
        self._origin: dict[int, tuple[str, int, int]] = {}  # by the number of the autograd node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kind, phase, inside, begun = self._place()
        peaks = self.peaks[phase > 0]
        peaks[begun] = max(peaks.get(begun, 0), self.live)
        if runs(func):
            used = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            flops, num_bytes = flops_of(func, args, kwargs, result), sum(t.nbytes for t in used)
            sort = CLASS_OF.get(func._schema.name.split("::")[1], POINTWISE)
            self.rows.append((KINDS.index(kind), phase, sort, inside, flops, num_bytes))
        return result

    def _place(self) -> tuple[str, int, int, int]:
        """Return kind, phase, segment, and how many segments had begun; in the backward pass those of what made the node."""
        if self.stack or self.phase == "forward":
            kind = self.stack[-1] if self.stack else "other"
            self._origin[torch.autograd._get_sequence_nr() - 1] = kind, self.inside, len(self.segments)
            return (
                kind,
                PHASES.index("forward" if self.phase == "forward" else "recomputed"),
                self.inside,
                len(self.segments),
            )
        node = torch._C._current_autograd_node()
        known = None if node is None else self._origin.get(node._sequence_nr())
        # What has no node of the forward pass, such as adding up gradients, belongs to the place where the pass is.
        kind, inside, self._begun = known or ("other", -1, self._begun)
        return kind, PHASES.index("backward"), inside, self._begun

    def part(self, is_block: bool, run: Callable[[], Any]) -> Any:
        """Run the forward pass of a part that can be recomputed; it is not told again when it is."""
        if self.phase != "forward":
            return run()
        self.inside, before = len(self.segments), self.live
        self.segments.append((is_block, 0))
        result = run()
        self._begun = len(self.segments)
        # Its results live on, whether it is recomputed or not.
        own = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
        self.segments[self.inside] = (is_block, max(0, self.live - before - own))
        self.inside = -1
        return result


@contextmanager
def _kinds(model: RaphaelUNet, notes: _Notes) -> Iterator[None]:
    """Let modules say when their forward pass runs, in recomputation too, which leaves it by an exception."""

    def telling(forward: Callable[..., Any], kind: str, part: bool) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            notes.stack.append(kind)
            try:
                if part:
                    return notes.part(kind == "rest of blocks", lambda: forward(*args, **kwargs))
                return forward(*args, **kwargs)
            finally:
                notes.stack.pop()

        return told

    for name, module in model.named_modules():
        kind = next((k for c, k in _OF_MODULE.items() if isinstance(module, c)), None)
        kind = {"attn1": "self-attention", "attn2": "cross-attention"}.get(name.rpartition(".")[2], kind)
        if kind is not None:
            module.forward = telling(module.forward, kind, isinstance(module, (ResidualBlock, TransformerBlock)))
    model.route_blocks = telling(model.route_blocks, "routing", False)  # type: ignore[method-assign]
    yield


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Make attention one kernel, which torch takes apart on the `meta` device, and loads even where a loop reads counts."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    def apply_sorted(self: experts.Experts, x_RD: Tensor, counts_K: Tensor, bias: bool = True) -> Tensor:
        if experts._use_grouped_mm(x_RD, self.hidden) and x_RD.shape[0]:
            return self._grouped(x_RD, counts_K, bias)
        rows, k = x_RD.shape[0], self.num_experts
        return self._loop(x_RD, [rows * (i + 1) // k - rows * i // k for i in range(k)], bias)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(experts.Experts, "apply_sorted", apply_sorted),
    ):
        yield


def meta_batch(config: Config, samples: int, num_blocks: int) -> Batch:
    """Return a batch without data, of the largest image size."""
    m, text = config.model, config.text.max_tokens
    height, width = max(config.image.buckets, key=lambda size: size[0] * size[1])
    factor = latent_factor(config.image.encoder)
    noise = None
    with META:
        latents = torch.empty(samples, m.latent_channels, height // factor, width // factor)
        if m.gate_noise > 0:
            time_BLK = torch.empty(samples, num_blocks, m.time_experts)
            noise = GateNoise(time_BLK, torch.empty(samples, num_blocks, text, m.space_experts))
        return Batch(
            position=torch.empty(samples, dtype=torch.long),
            weight=torch.empty(samples),
            x0=latents,
            noise=torch.empty_like(latents),
            timestep=torch.empty(samples, dtype=torch.long),
            text=torch.empty(samples, text, m.text_width),
            text_mask=torch.empty(samples, text, dtype=torch.bool),
            end=torch.empty(samples, dtype=torch.long),
            edge=torch.empty(samples, height, width) if config.edge.weight > 0 else None,
            gate_noise=noise,
            small=_meta_small(config, latents) if config.upscale.factor else None,
        )


def _meta_small(config: Config, latents: Tensor) -> Tensor:
    samples, _, height, width = latents.shape
    return torch.empty(samples, COLOURS, height * config.upscale.patch, width * config.upscale.patch)
