"""`train.cuda_graphs`: runs the U-Net's forward and backward pass as one CUDA graph each.

A step launches thousands of kernels. If each has little work (few images per GPU, a small model), the GPU waits for the
host, whereas a graph needs one launch. A captured graph always uses the same
- shapes: therefore there is a pair of graphs for each set of input shapes;
- addresses of weights: therefore ZeRO stage 1 or 2 is required, which updates weights in place;
- addresses of gradients: therefore the backward graph adds gradients to the buffers that the engine reduces over ranks
  (`engine.zero.Zero12Contiguous`).
Hooks of the parameters do not run in a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.cuda import _POOL_HANDLE
from torch.func import functional_call
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import UNetOutput

_WARM_UP = 3  # passes before a capture: libraries choose their kernels and allocate their memory
Forward = Callable[..., UNetOutput]
Gradients = Mapping[nn.Parameter, Tensor]
Arguments = tuple[Any, ...]  # of the U-Net: tensors, named tuples of tensors, and None
ShapeKey = tuple[tuple[torch.Size, torch.dtype], ...]


def replay_cuda_graphs(unet: RaphaelUNet, gradients: Gradients) -> None:
    """Replace the forward pass of `unet` by CUDA graphs: captured at the first training pass, replayed in later ones.

    Passes without gradients (validation, sampling) run without graphs.

    Args:
        unet: the model, changed in place. Its weights must not move in memory.
        gradients: for each trained parameter, the tensor that accumulates its gradient. It must not move in memory. A
            forward pass that captures graphs adds wrong values to these tensors. Therefore set them to 0 after that forward
            pass and before its backward pass.
    """
    unet.forward = _ReplayedForward(unet, gradients)  # type: ignore[method-assign, assignment]


class _ReplayedForward:
    """The replacement for `forward` of a U-Net. It captures graphs for each set of input shapes once, and replays them."""

    def __init__(self, unet: RaphaelUNet, gradients: Gradients) -> None:
        self._unet, self._eager, self._gradients = unet, unet.forward, gradients
        self._captured: dict[ShapeKey, _CapturedPass] = {}
        self._pool: _POOL_HANDLE | None = None  # memory of the first graph, shared by all

    def __call__(self, *args: Any) -> UNetOutput:
        arguments = args[: max(i for i, arg in enumerate(args) if arg is not None) + 1]
        key = _shape_key(arguments)
        # Sampling, validation and tools that record single operations run without graphs.
        if key is None or not torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
            return self._eager(*args)
        if key not in self._captured:
            captured = _CapturedPass(self._unet, self._eager, self._gradients, arguments, self._pool)
            self._captured[key], self._pool = captured, captured.forward_graph.pool()
        return self._captured[key](arguments)


def _shape_key(arguments: Arguments) -> ShapeKey | None:
    """Return shapes and dtypes of the U-Net's arguments, which identify a pair of graphs; None if one is not a tensor."""
    leaves = tree_leaves(arguments)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class _EagerModule(nn.Module):
    """The U-Net's original forward pass as a module, whose parameters `functional_call` can replace."""

    def __init__(self, unet: RaphaelUNet, eager: Forward) -> None:
        super().__init__()
        self.unet, self._eager = unet, eager

    def forward(self, *args: Any) -> UNetOutput:
        return self._eager(*args)


class _CapturedPass:
    """The CUDA graphs of one forward and one backward pass, with the tensors that they read and write."""

    def __init__(
        self, unet: RaphaelUNet, eager: Forward, gradients: Gradients, arguments: Arguments, pool: _POOL_HANDLE | None
    ) -> None:
        arguments = tree_map(torch.clone, arguments)
        module = _EagerModule(unet, eager)
        # New leaves with the same memory: the parameters belong to the stream of DeepSpeed's hooks, which a capture must not
        # touch.
        leaves = {}
        for name, p in module.named_parameters():
            leaves[name] = leaf = p.detach().requires_grad_(p.requires_grad)
            leaf.grad = gradients[p] if p.requires_grad else None
        self.inputs: list[Tensor] = tree_leaves(arguments)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.tie = torch.zeros((), device=self.inputs[0].device, requires_grad=True)  # makes the outputs require gradients
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                outputs = tree_leaves(functional_call(module, leaves, arguments))
                _run_backward(outputs, _zero_gradients(outputs))
            del outputs
        current.wait_stream(stream)
        # thread_local: the threads of the data loader and of NCCL continue to use the GPU.
        mode = "thread_local"
        with torch.cuda.graph(self.forward_graph, pool=pool, stream=stream, capture_error_mode=mode):
            outputs, self._spec = tree_flatten(functional_call(module, leaves, arguments))
        self.outputs: list[Tensor] = outputs
        self.output_gradients = _zero_gradients(self.outputs)
        with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), stream=stream, capture_error_mode=mode):
            _run_backward(self.outputs, self.output_gradients)

    def __call__(self, arguments: Arguments) -> UNetOutput:
        outputs = _Replay.apply(self, self.tie, *tree_leaves(arguments))  # type: ignore[no-untyped-call]
        result: UNetOutput = tree_unflatten(outputs, self._spec)
        return result


def _zero_gradients(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return for each output a tensor of zeros for its gradient; None for an output without a gradient."""
    return [torch.zeros_like(output) if output.requires_grad else None for output in outputs]


def _run_backward(outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None]) -> None:
    """Run the backward pass from `outputs`. It adds to the attribute `grad` of the leaf tensors.

    `output_gradients`: the gradient of each output. Outputs whose gradient is None are left out.
    """
    pairs = [(output, grad) for output, grad in zip(outputs, output_gradients, strict=True) if grad is not None]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _CapturedPass, tie: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.captured = captured
        ctx.set_materialize_grads(False)  # otherwise each output without a gradient costs a tensor of zeros
        torch._foreach_copy_(captured.inputs, list(inputs))
        captured.forward_graph.replay()
        outputs = tuple(output.detach() for output in captured.outputs)
        pairs = zip(outputs, captured.output_gradients, strict=True)
        ctx.mark_non_differentiable(*(output for output, grad in pairs if grad is None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        captured: _CapturedPass = ctx.captured
        pairs = [(b, g) for b, g in zip(captured.output_gradients, gradients, strict=True) if b is not None]
        torch._foreach_copy_([b for b, g in pairs if g is not None], [g for _, g in pairs if g is not None])
        for unused in (b for b, g in pairs if g is None):
            unused.zero_()
        captured.backward_graph.replay()
        return (None, None, *(None for _ in captured.inputs))
