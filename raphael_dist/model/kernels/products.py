"""What the Triton kernels of the experts share: a product of two matrices, the normal distribution, sizes of tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

Tile = dict[str, int]  # sizes that Triton compiles into a kernel, and its launch options


@triton.jit
def multiply(
    total, a, rows, row_mask, weight, cols, col_mask, depth, row_stride, depth_stride, col_stride,
    DOT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return total + a[rows, :depth] @ weight[:depth, cols], float32 [ROWS, COLS].

    `a` and `weight` are pointers. Where `row_mask` or `col_mask` is false, the result is `total`. `row_stride` is the stride
    of the rows of a; `depth_stride` and `col_stride` are the strides of the weight. `DOT`: dtype to which both factors are
    converted. `DEPTH`: tile size along the summed axis.
    """
    inner = tl.arange(0, DEPTH)
    a += rows.to(tl.int64)[:, None] * row_stride + inner[None, :]
    weight += inner[:, None] * depth_stride + cols[None, :] * col_stride
    for start in range(0, depth, DEPTH):
        inside = inner < depth - start
        left = tl.load(a + start, row_mask[:, None] & inside[None, :], 0.0)
        right = tl.load(weight + start * depth_stride, inside[:, None] & col_mask[None, :], 0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def normal_cdf(x):
    """Return the distribution function of the normal distribution: GELU is x times it."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x, cdf):
    """Return the derivative of GELU at x, given `normal_cdf(x)`."""
    return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


def factor_type(x: Tensor) -> tl.dtype:
    """Return the dtype in which kernels multiply matrices of the dtype of x, float32 or bfloat16."""
    # Triton's interpreter multiplies bfloat16 numbers as the integers that it stores them as.
    return tl.float32 if x.dtype == torch.float32 or triton.knobs.runtime.interpret else tl.bfloat16


def tile_of(x: Tensor) -> Tile:
    """Return Triton's options for matrix products with x: tile sizes, dtype of the factors (DOT), warps and stages."""
    if x.dtype == torch.float32:
        return {"ROWS": 64, "COLS": 64, "DEPTH": 32, "DOT": factor_type(x), "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLS": 128, "DEPTH": 64, "DOT": factor_type(x), "num_warps": 8, "num_stages": 3}
