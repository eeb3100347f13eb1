"""Traces one micro-step of the model on tensors without data: FLOPs and bytes of each operation, and live memory.

The model has its true widths and uses the code paths of a GPU. Attention counts as one fused kernel. Nothing is computed, so
a trace of a model with 3 B parameters takes a second. All counts are linear in the number of images, so two traces give the
trace of any micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from raphael_dist.config.schema import Config
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.edge_supervision import EdgeModule
from raphael_dist.model.experts import Experts
from raphael_dist.model.kernels.switch import require_triton, set_kernels
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.residual_block import ResidualBlock
from raphael_dist.model.routing import BlockRouting
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.planning.meta_batch import META, meta_batch
from raphael_dist.planning.op_costs import LiveBytes, flops_of, launches_work, op_class

Recompute = Literal["none", "blocks", "all"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "blocks", "all")
PHASES = ("forward", "backward", "recomputed")
KINDS = (
    "convolutions", "self-attention", "cross-attention", "time experts", "feed-forward", "space experts", "edge modules",
    "routing", "rest of blocks", "other",
)  # fmt: skip
_KIND_OF_MODULE: dict[type[nn.Module], str] = {
    ResidualBlock: "convolutions",
    Downsample2D: "convolutions",
    Upsample2D: "convolutions",
    TimeMoE: "time experts",
    FeedForward: "feed-forward",
    SpaceMoE: "space experts",
    EdgeModule: "edge modules",
    TransformerBlock: "rest of blocks",
}
SAMPLES = (2, 4)  # images of the two traces of a profile


@dataclass(frozen=True)
class Trace:
    """Operations and memory of one micro-step on a rank.

    A *segment* is a part of the model that can be recomputed: a transformer block or a residual block.

    Attributes:
        samples: images of the micro-step.
        kind, phase, op_class: int64 [ops], for each operation in order of execution, indices into KINDS, PHASES and
            op_costs.CLASSES.
        segment: int64 [ops], the segment of each operation, or -1. A backward operation belongs to the segment that it
            differentiates.
        flops, bytes: int64 [ops]. Bytes are those of inputs and outputs by their shapes, as if nothing stayed in a cache.
        is_block: bool [segments], True for transformer blocks.
        saved_by: int64 [segments], bytes that the forward pass of a segment keeps for its backward pass.
        peaks: int64 [2, segments + 1]. Element [p, i] is the largest number of live bytes in the forward (0) or backward (1)
            pass while `i` segments have been started. Gradients of weights are freed at once, as ZeRO does.
        saved: bytes of activations that are alive after the forward pass.
        sent: bytes that the rank sends to the experts of other ranks.
    """

    samples: int
    kind: NDArray[np.int64]
    phase: NDArray[np.int64]
    op_class: NDArray[np.int64]
    segment: NDArray[np.int64]
    flops: NDArray[np.int64]
    bytes: NDArray[np.int64]
    is_block: NDArray[np.bool_]
    saved_by: NDArray[np.int64]
    peaks: NDArray[np.int64]
    saved: int
    sent: int

    @property
    def launches(self) -> int:
        return len(self.flops)

    @property
    def peak(self) -> int:
        """The largest number of bytes of activations that exist at the same time in the micro-step."""
        return int(self.peaks.max())

    def total(self, values: NDArray[np.int64], phase: str | None = None, kind: str | None = None) -> int:
        """Return the sum of `values` (`flops` or `bytes`) over the operations of a phase and a kind.

        `phase`: a name in PHASES. `kind`: a name in KINDS. None: all of them.
        """
        chosen = np.ones(len(values), dtype=bool)
        if phase is not None:
            chosen &= self.phase == PHASES.index(phase)
        if kind is not None:
            chosen &= self.kind == KINDS.index(kind)
        return int(values[chosen].sum())

    def with_recomputation(self, recompute: Recompute) -> "Trace":
        """Return a trace in which the backward pass recomputes segments, from a trace without recomputation.

        The forward operations of these segments are repeated, and what they keep for the backward pass is freed. Real
        recomputation skips a few last operations; here they are counted.
        """
        if recompute == "none":
            return self
        recomputed = self.is_block | (recompute == "all")
        repeated = (self.phase == 0) & (self.segment >= 0)
        repeated[repeated] = recomputed[self.segment[repeated]]
        freed = np.where(recomputed, self.saved_by, 0)
        freed_before = np.concatenate([[0], np.cumsum(freed)])  # by all segments that ended before
        freed_earlier = np.concatenate([[0], freed_before[:-1]])  # without the segment that is being recomputed

        def with_repeated(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.concatenate([values, values[repeated]])

        return replace(
            self,
            kind=with_repeated(self.kind),
            op_class=with_repeated(self.op_class),
            segment=with_repeated(self.segment),
            flops=with_repeated(self.flops),
            bytes=with_repeated(self.bytes),
            phase=np.concatenate([self.phase, np.full(repeated.sum(), PHASES.index("recomputed"))]),
            # A recomputed segment needs as much as in its forward pass, on top of what is alive before it.
            peaks=self.peaks - freed_earlier,
            saved=self.saved - int(freed.sum()),
        )


@dataclass(frozen=True)
class Profile:
    """Two traces of a micro-step with few and with many images, from which the trace for any number is extrapolated."""

    few: Trace
    many: Trace

    def at(self, samples: int, recompute: Recompute = "none") -> Trace:
        """Return the trace of a micro-step of `samples` images, by linear extrapolation.

        `recompute`: which activations the backward pass recomputes: "none", those of transformer "blocks" or "all".
        """
        share = (samples - self.few.samples) / (self.many.samples - self.few.samples)

        def line(name: str) -> NDArray[np.int64]:
            few, many = getattr(self.few, name), getattr(self.many, name)
            return np.rint(few + (many - few) * share).astype(np.int64)

        trace = replace(
            self.few,
            samples=samples,
            flops=line("flops"),
            bytes=line("bytes"),
            saved_by=line("saved_by"),
            peaks=line("peaks"),
            saved=int(line("saved")),
            sent=int(line("sent")),
        )
        return trace.with_recomputation(recompute)


def profile(config: Config) -> Profile:
    """Trace a micro-step with two numbers of images, without expert parallelism and without recomputation."""
    few, many = (trace(config, samples, "none") for samples in SAMPLES)
    assert few.launches == many.launches, "the number of images changed which operations run"
    return Profile(few, many)


def trace(
    config: Config,
    samples: int,
    recompute: Recompute | None = None,
    shard: Callable[[RaphaelUNet, int], Traffic] | None = None,
) -> Trace:
    """Trace one micro-step of `samples` images of the largest size in `image.buckets`.

    Args:
        config: the run's configuration.
        samples: images of the micro-step.
        recompute: replaces `model.checkpoint_activations`; None keeps it.
        shard: a function of the model and the number of images that shards the model's experts and returns the counter of
            sent bytes (`expert_parallel_trace.shard_for_trace`). None: no expert parallelism.
    """
    update = {} if recompute is None else {"checkpoint_activations": recompute}
    config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    recorder = _Recorder()
    with META:
        model = _TracedUNet(config, recorder).to(dtype)
    traffic = Traffic() if shard is None else shard(model, samples)
    require_triton(config.train.kernels)  # nothing runs, but the module of the kernels also has the shapes of results
    set_kernels(model, config.train.kernels)
    _observe(model, recorder)
    schedule = NoiseSchedule.create(config.diffusion, META)
    batch = meta_batch(config, samples, model.num_blocks)
    with recorder:
        losses = compute_losses(model, batch, schedule, config, dtype)
        saved, recorder.phase = recorder.live, "backward"
        losses.total.sum().backward()
    kind, phase, classes, segment, flops, num_bytes = (np.array(c, dtype=np.int64) for c in zip(*recorder.rows, strict=True))
    num_segments = len(recorder.segments)
    return Trace(
        samples=samples,
        kind=kind,
        phase=phase,
        op_class=classes,
        segment=segment,
        flops=flops,
        bytes=num_bytes,
        is_block=np.array([is_block for is_block, _ in recorder.segments], dtype=bool),
        saved_by=np.array([size for _, size in recorder.segments], dtype=np.int64),
        peaks=np.array([[peaks.get(i, 0) for i in range(num_segments + 1)] for peaks in recorder.peaks]),
        saved=saved,
        sent=traffic.experts,
    )


class _Recorder(LiveBytes):
    """Records every operation that launches work, and live memory by segment (a transformer block or residual block).

    Attributes:
        rows: (kind, phase, class, segment, FLOPs, bytes) of each operation, as in `Trace`.
        phase: "forward" or "backward".
        segments: (whether it is a transformer block, bytes that its forward pass saved) of each segment.
        peaks: for the forward and the backward pass, {number of segments started: most live bytes}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.phase = "forward"
        self.segments: list[tuple[bool, int]] = []
        self.peaks: tuple[dict[int, int], dict[int, int]] = {}, {}
        self._kinds: list[str] = []  # of the modules whose forward pass is running, outermost first
        self._segment, self._started, self._live_before = -1, 0, 0
        self._origin: dict[int, tuple[str, int, int]] = {}  # by the sequence number of the autograd node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kind, phase, segment, started = self._place()
        peaks = self.peaks[phase > 0]
        peaks[started] = max(peaks.get(started, 0), self.live)
        if launches_work(func):
            num_bytes = sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            flops = flops_of(func, args, kwargs, result)
            self.rows.append((KINDS.index(kind), phase, op_class(func), segment, flops, num_bytes))
        return result

    def _place(self) -> tuple[str, int, int, int]:
        """Return (kind, phase, segment, number of started segments) of the current operation.

        In the backward pass they are those of the forward operation whose gradient is being computed.
        """
        if self._kinds or self.phase == "forward":
            kind = self._kinds[-1] if self._kinds else "other"
            self._origin[torch.autograd._get_sequence_nr() - 1] = kind, self._segment, len(self.segments)
            phase = "forward" if self.phase == "forward" else "recomputed"
            return kind, PHASES.index(phase), self._segment, len(self.segments)
        node = torch._C._current_autograd_node()
        origin = None if node is None else self._origin.get(node._sequence_nr())
        # Operations without a node of the forward pass, such as additions of gradients, belong to the current place.
        kind, segment, self._started = origin or ("other", -1, self._started)
        return kind, PHASES.index("backward"), segment, self._started

    @contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Return a context whose operations belong to the part `kind` of the model (one of KINDS)."""
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._kinds.pop()

    def enter(self, kind: str, is_segment: bool) -> None:
        """Record that the forward pass of a module starts.

        Args:
            kind: the module's part of the model, one of KINDS.
            is_segment: whether the module is a segment (see `Trace`). Recomputing it does not start another segment.
        """
        self._kinds.append(kind)
        if is_segment and self.phase == "forward":
            self._segment, self._live_before = len(self.segments), self.live
            self.segments.append((kind == "rest of blocks", 0))

    def leave(self, is_segment: bool, result: object) -> None:
        """Record that the forward pass of a module has ended and returned `result`. `is_segment`: as for `enter`."""
        self._kinds.pop()
        if is_segment and self.phase == "forward":
            self._started = len(self.segments)
            # The results stay alive, whether the segment is recomputed or not.
            results = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
            is_block = self.segments[self._segment][0]
            self.segments[self._segment] = (is_block, max(0, self.live - self._live_before - results))
            self._segment = -1


class _TracedUNet(RaphaelUNet):
    """A U-Net whose routing (the choice of experts) is recorded as a part of its own."""

    def __init__(self, config: Config, recorder: _Recorder) -> None:
        super().__init__(config)
        self._recorder = recorder

    def route_blocks(self, *args: Any) -> list[BlockRouting]:
        with self._recorder.part("routing"):
            return super().route_blocks(*args)


class _FusedAttention(TorchFunctionMode):
    """A context in which attention runs as one kernel. On the `meta` device, torch divides it into several operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        assert kwargs.get("attn_mask") is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]


class _FusedProcessor(AttnProcessor2_0):
    """diffusers' attention processor with `_FusedAttention`, also when the backward pass recomputes a block."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with _FusedAttention():
            return super().__call__(*args, **kwargs)


def _observe(model: RaphaelUNet, recorder: _Recorder) -> None:
    """Register hooks with which modules report their forward passes to the recorder, and weights free their gradients."""

    def observe(module: nn.Module, kind: str) -> None:
        is_segment = isinstance(module, (ResidualBlock, TransformerBlock))
        module.register_forward_pre_hook(lambda *_: recorder.enter(kind, is_segment))
        # always_call, because recomputation ends the forward pass of a module by an exception.
        module.register_forward_hook(lambda _, __, result: recorder.leave(is_segment, result), always_call=True)

    for name, module in model.named_modules():
        kind = next((kind for module_type, kind in _KIND_OF_MODULE.items() if isinstance(module, module_type)), None)
        kind = {"attn1": "self-attention", "attn2": "cross-attention"}.get(name.rpartition(".")[2], kind)
        if kind is not None:
            observe(module, kind)
        if isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
            module.set_processor(cast(Any, _FusedProcessor()))  # its type stubs require another class
        if isinstance(module, Experts):
            module.assumes_even_loads = True  # tensors on `meta` have no values to count
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(free_gradient)


def free_gradient(p: Tensor) -> None:
    """Drop the gradient of a parameter, to free its memory."""
    p.grad = None
