"""Muon: steps along the orthogonalised momentum for matrices, AdamW for all other parameters.

A matrix W [m, n] with the averaged gradient M and the gradient G takes the step

    W <- W - lr * 0.2 * sqrt(max(m, n)) * orthogonalise(beta1 * M + (1 - beta1) * G)

(https://kellerjordan.github.io/posts/muon/ with Nesterov momentum). The factor 0.2 * sqrt(max(m, n)) (arXiv 2502.16982)
makes the steps about as large as those of AdamW, so that the same learning rate can be used. M is stored as Adam's first
moment, so checkpoints have the same format as with AdamW.

ZeRO-1 and 2 divide the flattened weights over ranks, also in the middle of a matrix. Therefore all ranks gather the tensor
to be orthogonalised, which sends as many bytes as the gather of the new weights. Each rank then orthogonalises those
matrices of which it stores a part.
"""

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import deepspeed_comm
from raphael_dist.engine.expert_groups import ParameterGroup
from raphael_dist.engine.parameter_kinds import is_hidden_matrix
from raphael_dist.engine.zero_interface import FlatLayout

_SCALE = 0.2  # root mean square of AdamW's steps (arXiv 2502.16982)
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, by Keller Jordan


class Muon(torch.optim.AdamW):
    """The Muon optimizer for matrices in hidden layers, and AdamW for all other parameters.

    With ZeRO-0 the optimizer updates the parameters themselves. With ZeRO-1 and 2 each tensor that it updates is this rank's
    part of a flat tensor, in which many parameters lie one after another.
    """

    def __init__(self, parameters: list[ParameterGroup], dtype: torch.dtype, **settings: Any) -> None:
        """Create the optimizer. Call `set_layouts` before the first step.

        Args:
            parameters: groups of parameters.
            dtype: precision of the model, in which matrices are also gathered and orthogonalised.
            settings: further arguments of torch.optim.AdamW.
        """
        super().__init__(parameters, **settings)
        self._dtype = dtype
        self._layouts: dict[int, tuple[FlatLayout, list[tuple[int, tuple[int, ...]]]]] = {}

    def set_layouts(self, layouts: Iterator[FlatLayout], names: dict[nn.Parameter, str]) -> None:
        """Record where the matrices lie in the tensors that the optimizer updates.

        `layouts`: for each tensor that the optimizer updates, the parameters in it and where each of them starts. `names`:
        the name of each parameter, which decides whether the parameter is a matrix that Muon updates.
        """
        for layout in layouts:
            matrices = [(start, matrix_shape(p)) for p, start in layout.places if is_hidden_matrix(names[p])]
            if matrices:
                self._layouts[id(layout.part)] = layout, matrices

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all tensors that have a gradient: matrices by Muon, the others by AdamW.

        Collective with ZeRO-1 and 2, where a rank has only parts of matrices. `closure`: as for torch's optimizers, a
        function that computes the loss again, or None; its result is returned.
        """
        groups = [(group, p) for group in self.param_groups for p in group["params"]]
        updated = [(group, p, p.clone()) for group, p in groups if p.grad is not None and id(p) in self._layouts]
        result = super().step(closure)
        for group, p, before in updated:
            self._update(p, before.view(-1), group["lr"], group["betas"][0])
        return result

    def _update(self, p: Tensor, before: Tensor, lr: float, beta: float) -> None:
        """Replace AdamW's step by Muon's for the matrices in `p`, a tensor that the optimizer updates.

        `before`: the values of `p` before AdamW's step, float32 [numel]. `lr`: learning rate. `beta`: beta1.
        """
        assert p.grad is not None
        layout, matrices = self._layouts[id(p)]
        momentum = torch.lerp(self.state[p]["exp_avg"], p.grad, 1 - beta)
        first, whole = _gather(momentum.to(self._dtype).view(-1), layout.group)
        weights = p.view(-1)
        for start, shape in matrices:
            end = start + prod(shape)
            low, high = max(start, first), min(end, first + weights.numel())
            if low < high:
                update = orthogonalise(whole[start:end].view(shape)).reshape(-1)[low - start : high - start]
                stored = slice(low - first, high - first)
                weights[stored] = before[stored].sub_(update, alpha=lr * _SCALE * sqrt(max(shape[-2:])))


def _gather(part: Tensor, group: dist.ProcessGroup | None) -> tuple[int, Tensor]:
    """Gather a flat tensor of which each rank of `group` has a part; return the index where `part` begins, and the tensor.

    `part`: this rank's part, [numel]. `group`: None if `part` is already the whole tensor. Collective in `group`.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return 0, part
    whole = part.new_empty(ranks * part.numel())
    deepspeed_comm().all_gather_into_tensor(whole, part, group=group)
    return dist.get_rank(group) * part.numel(), whole


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return matrices with the same singular vectors, whose singular values are near 1 (between 0.7 and 1.2).

    `matrices`: [..., m, n], like the result. `iterations`: number of Newton-Schulz iterations; the range above is for five.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def matrix_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape in which Muon treats a parameter as a matrix, or as a stack of matrices.

    Args:
        p: the parameter.

    Returns:
        [m, n] for a matrix and [K, m, n] for K stacked experts, which keep their shape; [out, in * h * w] for a convolution
            kernel.
    """
    return tuple(p.shape) if p.ndim <= 3 else (p.shape[0], prod(p.shape[1:]))
