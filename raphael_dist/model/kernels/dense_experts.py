"""The experts of a layer in Triton, each on all tokens r: `out[r] = sum_k w[r,k] w2_k gelu(w1_k x[r] + b1_k)`.

K experts of hidden width F are computed as one feed-forward layer of hidden width K F, with two matrix products. The kernel
of the first product also applies bias, GELU and the weights w before it stores its results. So hidden units are written once
and read once, and there is no output for each expert. No hidden units are kept for the backward pass, which computes them
again together with their gradient. Sums are float32 and in a fixed order. The gradients of x, w1 and w2 are plain matrix
products, which torch computes.

| kernel | for row r and expert k |
|---|---|
| `_weighted_hidden` | h[r,k] = w[r,k] gelu(w1_k x[r] + b1_k) |
| `_sum_of_products` | out[r] = sum_k w2_k h[r,k] |
| `_hidden_gradient` | dh = w2_k^T dout[r]; da = w[r,k] dh gelu'(a); h[r,k] again; sums for dw = dh . gelu(a) and db1 |

Legend: R rows (tokens), K experts, D width, F hidden width; a = w1_k x[r] + b1_k.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from raphael_dist.model.kernels.products import gelu_slope, multiply, normal_cdf, tile_of

_NARROW = {"COLS": 64}  # columns of `_hidden_gradient`, which needs registers for two products


@triton.jit
def _weighted_hidden(
    x, w, w1, b1, h, rows, width, hidden, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, row = tl.program_id(2), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols, mask = tl.program_id(0) * COLS + tl.arange(0, COLS), row < rows
    inside, weight = cols < hidden, w1 + expert.to(tl.int64) * hidden * width
    a = tl.zeros([ROWS, COLS], tl.float32)
    a = multiply(a, x, row, mask, weight, cols, inside, width, width, 1, width, DOT, DEPTH)
    a += tl.load(b1 + expert * hidden + cols, inside, 0.0).to(tl.float32)[None, :]
    factor = tl.load(w + row * EXPERTS + expert, mask, 0.0).to(tl.float32)[:, None]
    offsets = (row.to(tl.int64) * EXPERTS + expert)[:, None] * hidden + cols[None, :]
    tl.store(h + offsets, (factor * a * normal_cdf(a)).to(h.dtype.element_ty), mask[:, None] & inside[None, :])


@triton.jit
def _sum_of_products(
    h, w2, out, rows, width, hidden, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask, inside, total = row < rows, cols < width, tl.zeros([ROWS, COLS], tl.float32)
    for _ in range(EXPERTS):
        total = multiply(total, h, row, mask, w2, cols, inside, hidden, EXPERTS * hidden, 1, hidden, DOT, DEPTH)
        h += hidden
        w2 += hidden * width
    offsets = row.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask[:, None] & inside[None, :])


@triton.jit
def _hidden_gradient(
    dout, x, w, w1, b1, w2, da, h, dw_parts, db_parts, rows, width, hidden, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, row = tl.program_id(2), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols, mask = tl.program_id(0) * COLS + tl.arange(0, COLS), row < rows
    inside, first = cols < hidden, expert.to(tl.int64) * hidden * width
    a, dh = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    a = multiply(a, x, row, mask, w1 + first, cols, inside, width, width, 1, width, DOT, DEPTH)
    a += tl.load(b1 + expert * hidden + cols, inside, 0.0).to(tl.float32)[None, :]
    dh = multiply(dh, dout, row, mask, w2 + first, cols, inside, width, width, hidden, 1, DOT, DEPTH)
    factor = tl.load(w + row * EXPERTS + expert, mask, 0.0).to(tl.float32)[:, None]
    cdf = normal_cdf(a)
    offsets = (row.to(tl.int64) * EXPERTS + expert)[:, None] * hidden + cols[None, :]
    both = mask[:, None] & inside[None, :]
    tl.store(h + offsets, (factor * a * cdf).to(h.dtype.element_ty), both)
    tl.store(dw_parts + (tl.program_id(0).to(tl.int64) * rows + row) * EXPERTS + expert, tl.sum(dh * a * cdf, 1), mask)
    dh *= factor * gelu_slope(a, cdf)  # 0 in rows outside, whose dout is 0
    tl.store(da + offsets, dh.to(da.dtype.element_ty), both)
    tl.store(db_parts + (tl.program_id(1) * EXPERTS + expert) * hidden + cols, tl.sum(dh, 0), inside)


def dense_experts(x_RD: Tensor, w_RK: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Return the weighted sum of K experts `sum_k w[r,k] w2_k gelu(w1_k x[r] + b1_k)` for each row r, [R, D].

    The result has the dtype of x, and the function is differentiable.

    Args:
        x_RD: rows (tokens), float32 or bfloat16, at least one.
        w_RK: weight of each expert for each row, in the dtype of x.
        w1: first weights of the experts, [K, F, D], in the dtype of x.
        b1: first biases, [K, F], in the dtype of x.
        w2: second weights, [K, D, F], in the dtype of x.
    """
    out_RD: Tensor = _forward(x_RD.contiguous(), w_RK.contiguous(), w1, b1, w2)
    return out_RD


@torch.library.custom_op("raphael::dense_experts", mutates_args=())
def _forward(x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    (experts, hidden, width), rows, tile = w1.shape, x.shape[0], tile_of(x)
    h, out = x.new_empty(rows, experts, hidden), torch.empty_like(x)
    tiles = triton.cdiv(rows, tile["ROWS"])
    grid = (triton.cdiv(hidden, tile["COLS"]), tiles, experts)
    _weighted_hidden[grid](x, w, w1, b1, h, rows, width, hidden, EXPERTS=experts, **tile)
    tile["num_warps"] = 8  # with 4, registers would spill for float32
    _sum_of_products[(triton.cdiv(width, tile["COLS"]), tiles)](h, w2, out, rows, width, hidden, EXPERTS=experts, **tile)
    return out


@_forward.register_fake
def _(x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("raphael::dense_experts_hidden_gradient", mutates_args=())
def _backward_hidden(
    dout: Tensor, x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return da and h, [R, K, F], and summands of the gradients of w [n, R, K] and b1 [m, K, F], float32.

    da is the gradient of the hidden units before GELU. h are the hidden units after GELU, multiplied by the weights w. The
    caller adds up the summands over their first dimension (tiles of hidden units for w, tiles of rows for b1).
    """
    (experts, hidden, width), rows, tile = w1.shape, x.shape[0], {**tile_of(x), **_NARROW}
    da, h, dw_parts, db_parts = _hidden_gradients(x, w1)
    grid = (len(dw_parts), len(db_parts), experts)
    _hidden_gradient[grid](
        dout, x, w, w1, b1, w2, da, h, dw_parts, db_parts, rows, width, hidden, EXPERTS=experts, **tile
    )  # fmt: skip
    return da, h, dw_parts, db_parts


def _hidden_gradients(x: Tensor, w1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of `_backward_hidden`."""
    (experts, hidden, _), rows, tile = w1.shape, x.shape[0], {**tile_of(x), **_NARROW}
    da, h = (x.new_empty(rows, experts, hidden) for _ in range(2))
    dw_parts = x.new_empty(triton.cdiv(hidden, tile["COLS"]), rows, experts, dtype=torch.float32)
    return da, h, dw_parts, x.new_empty(triton.cdiv(rows, tile["ROWS"]), experts, hidden, dtype=torch.float32)


@_backward_hidden.register_fake
def _(dout: Tensor, x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _hidden_gradients(x, w1)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    x, w, w1, b1, w2 = ctx.saved_tensors
    dout = dout.contiguous()
    da_RKF, h_RKF, dw_parts, db_parts = _backward_hidden(dout, x, w, w1, b1, w2)
    da_RH = da_RKF.flatten(1)
    dw2 = torch.bmm(dout.t().expand(len(w2), -1, -1), h_RKF.transpose(0, 1))
    dw1 = (da_RH.t() @ x).view_as(w1)
    return da_RH @ w1.flatten(0, 1), dw_parts.sum(dim=0).to(w.dtype), dw1, db_parts.sum(dim=0).to(b1.dtype), dw2


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.raphael.dense_experts)
def _flops(x: torch.Size, w: torch.Size, w1: torch.Size, *_: object, **__: object) -> int:
    return 4 * x[0] * w1[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.raphael.dense_experts_hidden_gradient)
def _hidden_flops(dout: torch.Size, x: torch.Size, w: torch.Size, w1: torch.Size, *_: object, **__: object) -> int:
    return 4 * x[0] * w1[0] * w1[1] * w1[2]
