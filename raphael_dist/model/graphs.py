"""`train.cuda_graphs`: the U-Net's forward and backward pass as one CUDA graph each, for steps that the host holds up.

A step launches thousands of kernels. Where each has little to do (few images on a GPU, a small model) the GPU waits for the
host; a graph is launched at one go. What is captured is fixed: shapes (a pair of graphs for each), and the addresses of
weights, which ZeRO-1 and 2 update in place, and of gradients, which the backward graph adds up where the engine reduces them
from (`engine.zero.Collected`). Hooks of the parameters do not run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from raphael_dist.model.unet import RaphaelUNet, UNetOutput

_WARM_UP = 3  # passes: libraries choose their kernels and take their memory
Eager = Callable[..., UNetOutput]
Gradients = Mapping[nn.Parameter, Tensor]


def replay(unet: RaphaelUNet, gradients: Gradients) -> None:
    """Let the training passes of `unet` be captured when they first run, and replayed from then on.

    gradients: for each trained parameter the tensor to which its gradient is added. They and the weights must stay where
    they are. The pass that captures adds to them before its backward pass is asked for: clear them in between.
    """
    unet.forward = _Replayed(unet, gradients)  # type: ignore[method-assign, assignment]


class _Replayed:
    """Stands for `forward` of a U-Net: replays what was captured for the shapes that are given, or captures it."""

    def __init__(self, unet: RaphaelUNet, gradients: Gradients) -> None:
        self._unet, self._eager, self._gradients = unet, unet.forward, gradients
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None  # of the first graph

    def __call__(self, *args: Any) -> UNetOutput:
        given = args[: max(i for i, arg in enumerate(args) if arg is not None) + 1]
        kinds = tuple(_kind(one) for one in tree_leaves(given))
        # Sampling, validation, and whoever watches single operations have them run one by one.
        if None in kinds or not torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
            return self._eager(*args)
        if kinds not in self._captured:
            self._captured[kinds] = new = _Captured(self._unet, self._eager, self._gradients, given, self._pool)
            self._pool = new.forward_graph.pool()
        return self._captured[kinds](given)


def _kind(value: Any) -> tuple[Any, ...] | None:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


class _Whole(nn.Module):
    """The U-Net's own forward pass as a module, whose parameters `functional_call` can exchange."""

    def __init__(self, unet: RaphaelUNet, eager: Eager) -> None:
        super().__init__()
        self.unet, self._eager = unet, eager

    def forward(self, *args: Any) -> UNetOutput:
        return self._eager(*args)


class _Captured:
    """A pair of graphs with what they read and write: inputs, outputs, and the gradients of these."""

    def __init__(self, unet: RaphaelUNet, eager: Eager, gradients: Gradients, given: tuple[Any, ...], pool: Any) -> None:
        given = tree_map(torch.clone, given)
        whole = _Whole(unet, eager)
        # The same weights as leaves of their own: those of the parameters belong to the stream that DeepSpeed made its
        # hooks on, which a capture must not touch.
        leaves = {}
        for name, p in whole.named_parameters():
            leaves[name] = leaf = p.detach().requires_grad_(p.requires_grad)
            leaf.grad = gradients[p] if p.requires_grad else None
        self.inputs = tree_leaves(given)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.tie = torch.zeros((), device=self.inputs[0].device, requires_grad=True)  # there are gradients to be had
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                outputs = tree_leaves(functional_call(whole, leaves, given))
                _backward(outputs, _zeros(outputs))
            del outputs
        current.wait_stream(stream)
        # Other threads may go on to use the GPU meanwhile: the one that reads ahead, NCCL's.
        how: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward_graph, pool=pool, **how):
            self.outputs, self._spec = tree_flatten(functional_call(whole, leaves, given))
        self.output_gradients = _zeros(self.outputs)
        with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), **how):
            _backward(self.outputs, self.output_gradients)

    def __call__(self, given: tuple[Any, ...]) -> UNetOutput:
        found: UNetOutput = tree_unflatten(_Replay.apply(self, self.tie, *tree_leaves(given)), self._spec)
        return found


def _zeros(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return room for the gradients of outputs, None for those that have none."""
    return [torch.zeros_like(output) if output.requires_grad else None for output in outputs]


def _backward(outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None]) -> None:
    """Add to the gradients of the leaves."""
    pairs = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, tie: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.captured = captured
        torch._foreach_copy_(captured.inputs, list(inputs))
        captured.forward_graph.replay()
        outputs = tuple(output.detach() for output in captured.outputs)
        ctx.mark_non_differentiable(*(o for o, g in zip(outputs, captured.output_gradients, strict=True) if g is None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        captured: _Captured = ctx.captured
        pairs = [(mine, g) for mine, g in zip(captured.output_gradients, gradients, strict=True) if mine is not None]
        torch._foreach_copy_([mine for mine, _ in pairs], [g for _, g in pairs])
        captured.backward_graph.replay()
        return (None, None, *(None for _ in captured.inputs))
