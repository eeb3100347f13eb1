"""The backward pass of LayerNorm in Triton, for an input matrix of many rows (tokens) and few columns.

torch's kernel for the gradients of weight and bias reads the matrix column by column. It is the slowest kernel of a step
of the preset `emoji`. Here the rows are divided evenly over Triton programs, whose number depends on the shape alone. A
program computes the gradient of its input rows and sums over these rows the gradients of weight and bias. torch adds the
sums of all programs. All sums are float32 and in a fixed order.

Whole rows are read anyway, so mean and deviation are computed again at no cost. The forward pass is torch's.

Legend: R rows, D columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_TILE = 4096  # numbers of a tile
_PROGRAMS = 512  # about four for each multiprocessor


@triton.jit
def _backward_rows(
    dy, x, weight, dx, weight_parts, bias_parts, rows, columns, eps, tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program, col = tl.program_id(0), tl.arange(0, COLS)
    inside = col < columns
    w = tl.load(weight + col, inside, 0.0).to(tl.float32)[None, :]
    d_weight, d_bias = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for i in range(tiles):
        row = (program * tiles + i) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row.to(tl.int64)[:, None] * columns + col[None, :]
        values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
        deviation = tl.where(mask, values - tl.sum(values, 1)[:, None] / columns, 0.0)
        scale = 1 / tl.sqrt(tl.sum(deviation * deviation, 1)[:, None] / columns + eps)
        normal, dz = deviation * scale, tl.load(dy + offsets, mask, 0.0).to(tl.float32)
        d_weight += tl.sum(dz * normal, 0)
        d_bias += tl.sum(dz, 0)
        dz *= w
        out = scale * (dz - tl.sum(dz, 1)[:, None] / columns - normal * (tl.sum(dz * normal, 1)[:, None] / columns))
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask)
    tl.store(weight_parts + program * columns + col, d_weight, inside)
    tl.store(bias_parts + program * columns + col, d_bias, inside)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Apply LayerNorm over the last dimension of x [..., D], float32 or bfloat16; the backward pass is a Triton kernel.

    `weight_D`, `bias_D`: scale and shift after the normalisation, [D]. `eps`: added to the variance.
    """
    y: Tensor = _LayerNorm.apply(x, weight_D, bias_D, eps)
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        dx, parts = _backward(dy.contiguous(), x.contiguous(), weight_D, ctx.eps)
        d_weight, d_bias = parts.sum(dim=1).to(weight_D.dtype).unbind()
        return dx.view_as(x), d_weight, d_bias, None


@torch.library.custom_op("raphael::layer_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of weight and bias summed by each Triton program, float32 [2, programs, D]."""
    columns, dx = weight.numel(), torch.empty_like(x)
    parts, (tiles, tile_rows) = _parts(x, columns), _tiles(x.numel() // columns, columns)
    _backward_rows[(parts.shape[1],)](
        dy, x, weight, dx, *parts.unbind(), x.numel() // columns, columns, eps, tiles,
        ROWS=tile_rows, COLS=triton.next_power_of_2(columns),
    )  # fmt: skip
    return dx, parts


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _parts(x, weight.numel())


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    """Return the number of tiles (blocks of whole rows) for each Triton program, and the number of rows of a tile."""
    tile_rows = max(1, _TILE // triton.next_power_of_2(columns))
    return -(-rows // (tile_rows * _PROGRAMS)), tile_rows


def _parts(x: Tensor, columns: int) -> Tensor:
    rows = x.numel() // columns
    tiles, tile_rows = _tiles(rows, columns)
    return x.new_empty(2, -(-rows // (tiles * tile_rows)), columns, dtype=torch.float32)
