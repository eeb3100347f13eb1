"""Records the operations and the live memory of a model while it runs on tensors without data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from raphael_dist.config.schema import Config
from raphael_dist.model.edge_supervision import EdgeModule
from raphael_dist.model.experts import Experts
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.residual_block import ResidualBlock
from raphael_dist.model.routing import BlockRouting
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.planning.op_costs import Arguments, LiveBytes, Options, flops_of, launches_work, op_class

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


class Recorder(LiveBytes):
    """Records every operation that launches work, and live memory by segment (a transformer block or residual block).

    Attributes:
        rows: (kind, phase, class, segment, FLOPs, bytes) of each operation: part of the model (index into KINDS), pass
            (into PHASES), class such as convolution (into op_costs.CLASSES), number of the segment or -1, FLOPs, and
            bytes of inputs and outputs.
        phase: the current pass, "forward" or "backward".
        segments: for each segment, (whether it is a transformer block, bytes that its forward pass saved for the backward
            pass).
        peaks: two dicts. Entry i of the first is the largest number of live bytes during the forward pass while exactly i
            segments had started. Entry i of the second is for the backward pass of the same operations.
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

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Arguments = (), kwargs: Options | None = None
    ) -> object:
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
        """Return (part of the model, index of the pass, segment, number of started segments) of the current operation.

        An operation of the backward pass has the part and segments of the forward operation that it differentiates.
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
        """Return a context manager inside which operations count as the part `kind` of the model (one of KINDS)."""
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._kinds.pop()

    def enter(self, kind: str, is_segment: bool) -> None:
        """Record that the forward pass of a module starts.

        Args:
            kind: the module's part of the model, one of KINDS.
            is_segment: whether the module is a segment, i.e. a transformer block or a residual block. If this forward pass
                is a recomputation in the backward pass, no new segment is recorded.
        """
        self._kinds.append(kind)
        if is_segment and self.phase == "forward":
            self._segment, self._live_before = len(self.segments), self.live
            self.segments.append((kind == "rest of blocks", 0))

    def leave(self, is_segment: bool, result: object) -> None:
        """Record that the forward pass of a module has ended.

        `is_segment`: whether the module is a segment, i.e. a transformer or residual block. `result`: what it returned.
        """
        self._kinds.pop()
        if is_segment and self.phase == "forward":
            self._started = len(self.segments)
            # The results stay alive, whether the segment is recomputed or not.
            results = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
            is_block = self.segments[self._segment][0]
            self.segments[self._segment] = (is_block, max(0, self.live - self._live_before - results))
            self._segment = -1


class TracedUNet(RaphaelUNet):
    """A U-Net whose routing (the choice of experts) is recorded as the part "routing" of the model."""

    def __init__(self, config: Config, recorder: Recorder) -> None:
        super().__init__(config)
        self._recorder = recorder

    def route_blocks(self, *args: Any) -> list[BlockRouting]:
        with self._recorder.part("routing"):
            return super().route_blocks(*args)


class _FusedAttention(TorchFunctionMode):
    """A context in which attention runs as one kernel, also on the `meta` device.

    Without this context, torch divides attention on the `meta` device into several operations.
    """

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        assert kwargs.get("attn_mask") is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]


class _FusedProcessor(AttnProcessor2_0):
    """diffusers' attention processor, changed to run attention as one kernel (`_FusedAttention`), also in recomputation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with _FusedAttention():
            return super().__call__(*args, **kwargs)


def observe_modules(model: RaphaelUNet, recorder: Recorder) -> None:
    """Prepare a model to be traced: its modules report their forward passes to `recorder`, attention runs as one kernel.

    Gradients of weights are freed as soon as they are complete.
    """

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
    """Set the gradient of the parameter `p` to None, to free its memory. This function is used as a hook of autograd."""
    p.grad = None
