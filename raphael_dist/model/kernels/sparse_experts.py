"""The experts of a layer, computed in Triton for the (row, expert) pairs with a weight w > 0 only. A row is a token.

`out[r] = sum_k w[r,k] w2_k gelu(w1_k x[r] + b1_k)` over these pairs. The pairs are numbered on the device, sorted by expert,
so the host does not wait for their number. Buffers and grids have the size for the largest possible number of pairs. Shapes
are therefore fixed, as CUDA graphs require. Programs beyond the last pair end at once, so that the work follows the number
of pairs. Sums over the experts of a row, and over the rows of an expert, are float32 and in a fixed order. For the backward
pass only `a` is kept.

| kernel | for pair p = (r, k) |
|---|---|
| `_hidden` | a[p] = w1_k x[r] + b1_k, and h[p] = gelu(a[p]) |
| `_product` | y[p] = w2_k h[p]; in the backward pass dx[p] = w1_k^T da[p] |
| `_sum_pairs` | out[r] = sum_k w[r,k] y[p]; dx[r] = sum_k dx[p] |
| `_hidden_gradient` | dh = w2_k^T dout[r]; da[p] = w[r,k] dh gelu'(a[p]); wh[p] = w[r,k] h[p]; dw[r,k] = dh . h[p] |
| `_weight_gradient` | dw2_k = sum_p dout[r] wh[p]^T; dw1_k = sum_p da[p] x[r]^T; db1_k = sum_p da[p] |

Legend: R rows (tokens), K experts, D width, F hidden width, P largest number of pairs (R K, or R for one expert per row).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from raphael_dist.model.kernels.pairs import find_pairs
from raphael_dist.model.kernels.products import Tile, gelu_slope, multiply, normal_cdf, tile_of


@triton.jit
def _pairs_of_tile(ends, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return this Triton program's expert, the numbers of its pairs [ROWS], and the number after the expert's last pair.

    A program processes a tile: up to ROWS pairs of one expert. If there are fewer tiles than programs, the last value is 0
    for programs without a tile. `ends`: for each expert, the number of pairs of this expert and all experts before it.
    """
    tile, tiles, begin = tl.program_id(1), 0, 0
    expert, first, last = 0, 0, 0
    for k in tl.static_range(EXPERTS):
        end = tl.load(ends + k)
        own = tl.cdiv(end - begin, ROWS)
        here = (tile >= tiles) & (tile < tiles + own)
        expert = tl.where(here, k, expert)
        first = tl.where(here, begin + (tile - tiles) * ROWS, first)
        last = tl.where(here, end, last)
        tiles += own
        begin = end
    return expert, first + tl.arange(0, ROWS), last


@triton.jit
def _hidden(
    x, row, ends, w1, b1, a, h, width, hidden, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, pairs, end = _pairs_of_tile(ends, EXPERTS, ROWS)
    if end > 0:
        cols, mask = tl.program_id(0) * COLS + tl.arange(0, COLS), pairs < end
        inside = cols < hidden
        rows = tl.load(row + pairs, mask, 0)
        weight = w1 + expert.to(tl.int64) * hidden * width
        value = tl.zeros([ROWS, COLS], tl.float32)
        value = multiply(value, x, rows, mask, weight, cols, inside, width, width, 1, width, DOT, DEPTH)
        value += tl.load(b1 + expert * hidden + cols, inside, 0.0).to(tl.float32)[None, :]
        offsets, both = pairs.to(tl.int64)[:, None] * hidden + cols[None, :], mask[:, None] & inside[None, :]
        tl.store(a + offsets, value.to(a.dtype.element_ty), both)
        tl.store(h + offsets, (value * normal_cdf(value)).to(h.dtype.element_ty), both)


@triton.jit
def _product(
    a, ends, weight, out, inner, outer, depth_stride, col_stride, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, pairs, end = _pairs_of_tile(ends, EXPERTS, ROWS)
    if end > 0:
        cols, mask = tl.program_id(0) * COLS + tl.arange(0, COLS), pairs < end
        inside = cols < outer
        weight += expert.to(tl.int64) * inner * outer
        value = tl.zeros([ROWS, COLS], tl.float32)
        value = multiply(value, a, pairs, mask, weight, cols, inside, inner, inner, depth_stride, col_stride, DOT, DEPTH)
        offsets = pairs.to(tl.int64)[:, None] * outer + cols[None, :]
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask[:, None] & inside[None, :])


@triton.jit
def _hidden_gradient(
    dout, row, ends, w2, w, a, da, wh, dw_parts, places, width, hidden, EXPERTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert, pairs, end = _pairs_of_tile(ends, EXPERTS, ROWS)
    if end > 0:
        cols, mask = tl.program_id(0) * COLS + tl.arange(0, COLS), pairs < end
        inside = cols < hidden
        rows = tl.load(row + pairs, mask, 0)
        weight = w2 + expert.to(tl.int64) * hidden * width
        dh = tl.zeros([ROWS, COLS], tl.float32)
        dh = multiply(dh, dout, rows, mask, weight, cols, inside, width, width, hidden, 1, DOT, DEPTH)
        offsets, both = pairs.to(tl.int64)[:, None] * hidden + cols[None, :], mask[:, None] & inside[None, :]
        value = tl.load(a + offsets, both, 0.0).to(tl.float32)
        factor = tl.load(w + rows * EXPERTS + expert, mask, 0.0).to(tl.float32)[:, None]
        cdf = normal_cdf(value)
        slope = gelu_slope(value, cdf)
        tl.store(da + offsets, (factor * dh * slope).to(da.dtype.element_ty), both)
        tl.store(wh + offsets, (factor * value * cdf).to(wh.dtype.element_ty), both)
        tl.store(dw_parts + tl.program_id(0).to(tl.int64) * places + pairs, tl.sum(dh * value * cdf, 1), mask)


@triton.jit
def _sum_pairs(
    y, place, w, out, rows, width, EXPERTS: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(EXPERTS):
        pair = tl.load(place + row * EXPERTS + k, row < rows, -1)
        mask = (pair >= 0)[:, None] & (col < width)[None, :]
        value = tl.load(y + pair.to(tl.int64)[:, None] * width + col[None, :], mask, 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(w + row * EXPERTS + k, row < rows, 0.0).to(tl.float32)[:, None]
        total += value
    offsets = row.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), (row < rows)[:, None] & (col < width)[None, :])


@triton.jit
def _weight_gradient(
    left, right, row, ends, out, sums, left_width, right_width, GATHER_LEFT: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store `out[k] = sum_p left[p]^T right[p]` over the (row, expert) pairs p of this program's expert k.

    Also store `sums[k] = sum_p left[p]`, unless `sums` is None. `row`: the row (token) of each pair. `ends`: for each
    expert, the number of pairs of this expert and all experts before it. With GATHER_LEFT, `left` has a vector for each
    row and `right` one for each pair; without, it is the other way round. The lengths of
    these vectors are `left_width` and `right_width`.
    """
    expert = tl.program_id(2)
    end, begin = tl.load(ends + expert), tl.load(ends + expert - 1, expert > 0, 0)
    lefts, rights = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    total, left_sum = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, DEPTH):
        pairs = start + tl.arange(0, DEPTH)
        mask = pairs < end
        rows = tl.load(row + pairs, mask, 0)
        if GATHER_LEFT:
            left_rows, right_rows = rows, pairs
        else:
            left_rows, right_rows = pairs, rows
        left_at = left + left_rows.to(tl.int64)[None, :] * left_width + lefts[:, None]
        right_at = right + right_rows.to(tl.int64)[:, None] * right_width + rights[None, :]
        a = tl.load(left_at, mask[None, :] & (lefts < left_width)[:, None], 0.0)
        b = tl.load(right_at, mask[:, None] & (rights < right_width)[None, :], 0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision="ieee")
        if sums is not None:
            left_sum += tl.sum(a.to(tl.float32), 1)
    offsets = (expert.to(tl.int64) * left_width + lefts)[:, None] * right_width + rights[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), (lefts < left_width)[:, None] & (rights < right_width)[None, :])
    if sums is not None:
        first = (lefts < left_width) & (tl.program_id(0) == 0)
        tl.store(sums + expert * left_width + lefts, left_sum.to(sums.dtype.element_ty), first)


def sparse_experts(x_RD: Tensor, w_RK: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, per_row: int) -> Tensor:
    """Return the weighted sum of K experts `sum_k w[r,k] w2_k gelu(w1_k x[r] + b1_k)` for each row r, [R, D].

    The result has the dtype of x, and the function is differentiable.

    Args:
        x_RD: rows (tokens), float32 or bfloat16, at least one.
        w_RK: weight of each expert for each row, at least 0. Pairs with weight 0 are not computed.
        w1: first weights of the experts, [K, F, D], in the dtype of x.
        b1: first biases, [K, F], in the dtype of x.
        w2: second weights, [K, D, F], in the dtype of x.
        per_row: upper bound of the number of experts with w > 0 in a row.
    """
    w_RK = w_RK.contiguous()
    out_RD: Tensor = _forward(x_RD.contiguous(), w_RK, w1, b1, w2, *find_pairs(w_RK, per_row))[0]
    return out_RD


def _product_grid(places: int, experts: int, outer: int, tile: Tile) -> tuple[int, int]:
    # Programs of one tile of pairs are neighbours. Every expert has at most one tile that it does not fill.
    return triton.cdiv(outer, tile["COLS"]), triton.cdiv(places, tile["ROWS"]) + experts


@torch.library.custom_op("raphael::sparse_experts", mutates_args=())
def _forward(
    x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, row: Tensor, place: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output [R, D], and the hidden units before GELU of each (row, expert) pair, [P, F].

    `row`, `place` and `ends` are the fields of `Pairs`: row of each pair, number of each pair, end of each expert's pairs.
    """
    (experts, hidden, width), places, tile = w1.shape, row.numel(), tile_of(x)
    a, h, y = x.new_empty(places, hidden), x.new_empty(places, hidden), x.new_empty(places, width)
    grid = _product_grid(places, experts, hidden, tile)
    _hidden[grid](x, row, ends, w1, b1, a, h, width, hidden, EXPERTS=experts, **tile)
    grid = _product_grid(places, experts, width, tile)
    _product[grid](h, ends, w2, y, hidden, width, 1, hidden, EXPERTS=experts, **tile)
    return _sum(y, place, w), a


def _sum(y_PD: Tensor, place_RK: Tensor, w_RK: Tensor | None) -> Tensor:
    """Return for each row the sum of `y_PD` over its (row, expert) pairs, [R, D]. `w_RK`: weights; None: all are 1."""
    (rows, experts), width = place_RK.shape, y_PD.shape[1]
    out, cols = y_PD.new_empty(rows, width), min(128, triton.next_power_of_2(width))
    _sum_pairs[(triton.cdiv(rows, 16), triton.cdiv(width, cols))](
        y_PD, place_RK, w_RK, out, rows, width, EXPERTS=experts, WEIGHTED=w_RK is not None, ROWS=16, COLS=cols
    )
    return out


@_forward.register_fake
def _(
    x: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, row: Tensor, place: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(row.numel(), w1.shape[1])


@torch.library.custom_op("raphael::sparse_experts_backward", mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, w: Tensor, w1: Tensor, w2: Tensor, row: Tensor, place: Tensor, ends: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w, w1, b1 and w2.

    `row`, `place` and `ends` are the fields of `Pairs`: row of each (row, expert) pair, number of each pair, end of each
    expert's pairs. `a`: hidden units before GELU, from `_forward`.
    """
    (experts, hidden, width), places, tile = w1.shape, row.numel(), tile_of(x)
    da, wh = torch.empty_like(a), torch.empty_like(a)
    narrow = {**tile, "COLS": 64}  # its results need registers too; with 128 columns some would spill
    grid = _product_grid(places, experts, hidden, narrow)
    dw_parts = x.new_empty(grid[0], places, dtype=torch.float32)
    _hidden_gradient[grid](
        dout, row, ends, w2, w, a, da, wh, dw_parts, places, width, hidden, EXPERTS=experts, **narrow
    )  # fmt: skip
    dw1, db1, dw2 = torch.empty_like(w1), w1.new_empty(experts, hidden), torch.empty_like(w2)
    cells = (triton.cdiv(hidden, tile["COLS"]), triton.cdiv(width, tile["ROWS"]), experts)
    _weight_gradient[cells](dout, wh, row, ends, dw2, None, width, hidden, GATHER_LEFT=True, **tile)
    cells = (triton.cdiv(width, tile["COLS"]), triton.cdiv(hidden, tile["ROWS"]), experts)
    _weight_gradient[cells](da, x, row, ends, dw1, db1, hidden, width, GATHER_LEFT=False, **tile)
    dx_pairs = x.new_empty(places, width)
    grid = _product_grid(places, experts, width, tile)
    _product[grid](da, ends, w1, dx_pairs, hidden, width, width, 1, EXPERTS=experts, **tile)
    dw_P = dw_parts.sum(dim=0)  # without a meaning after the last pair
    dw_RK = torch.where(place >= 0, dw_P[place.clamp(min=0).long()], 0.0).to(w.dtype)
    return _sum(dx_pairs, place, None), dw_RK, dw1, db1, dw2


@_backward.register_fake
def _(
    dout: Tensor, x: Tensor, w: Tensor, w1: Tensor, w2: Tensor, row: Tensor, place: Tensor, ends: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b1 = w1.new_empty(w1.shape[:2])
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(w1), b1, torch.empty_like(w2)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, w1, _, w2, *pairs = inputs
    ctx.set_materialize_grads(False)  # of a, which has no gradient
    ctx.save_for_backward(x, w, w1, w2, *pairs, output[1])


def _differentiate(ctx: Any, dout: Tensor, _: object) -> tuple[Tensor | None, ...]:
    dx, dw, dw1, db1, dw2 = _backward(dout.contiguous(), *ctx.saved_tensors)
    return dx, dw, dw1, db1, dw2, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.raphael.sparse_experts)
def _flops(
    x: torch.Size, w: torch.Size, w1: torch.Size, b1: torch.Size, w2: torch.Size, row: torch.Size, *_: object, **__: object
) -> int:
    """Return the FLOPs of the forward pass for the largest possible number of (row, expert) pairs.

    The actual number of pairs is known on the device only.
    """
    return 4 * row[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.raphael.sparse_experts_backward)
def _backward_flops(
    dout: torch.Size, x: torch.Size, w: torch.Size, w1: torch.Size, w2: torch.Size, row: torch.Size, *_: object, **__: object
) -> int:
    return 8 * row[0] * w1[1] * w1[2]
