"""GroupNorm, with or without SiLU after it, of channels-last feature maps: forward and backward pass in Triton.

A map [B, C, H, W] in channels-last memory is a matrix of H W pixels and C channels for each sample. A group has few channels
(10 of 320), fewer than a cache line. Therefore a Triton program processes a tile of 64 pixels and up to 64 channels, and a
statistic of a group takes two kernels: one sums each channel over a tile's pixels, the other sums over the tiles and the
channels of the group. All sums are float32 and in a fixed order.

| kernel | grid | reads | writes |
|---|---|---|---|
| `_channel_moments` | tiles | x | mean and squared deviations of each channel in a tile |
| `_group_moments` | (sample, group) | results of `_channel_moments` | mean and 1 / standard deviation of each group |
| `_normalise` | tiles | x | y |
| `_channel_gradients` | tiles | dy, x | sums of dz and dz x^ of each channel in a tile |
| `_group_gradients` | (sample, group) | these sums | their sums over all pixels, and means over the group |
| `_input_gradient` | tiles | dy, x | dx |

Legend: x^ = (x - mean) / deviation, z = w x^ + b, y = silu(z) or z; dx, dy and dz are gradients of the loss.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLS = 64, 64  # pixels and channels of a tile: 128 bytes of a pixel in bfloat16
_CHUNK = 16  # tiles whose sums are added at a time


@triton.jit
def _tile(tiles, pixels, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the elements of x that this Triton program processes: a tile of ROWS pixels and COLS channels of a sample.

    These are the index of the sample, the index of the tile in it, the channels [COLS], and the offsets in x and the mask of
    the elements, each [ROWS, COLS].
    """
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    offsets = (sample.to(tl.int64) * pixels + row)[:, None] * channels + col[None, :]
    return sample, tile, col, offsets, (row < pixels)[:, None] & (col < channels)[None, :]


@triton.jit
def _channel_moments(x, mean, squares, tiles, pixels, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    sample, tile, col, offsets, mask = _tile(tiles, pixels, channels, ROWS, COLS)
    values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    center = tl.sum(values, 0) / tl.minimum(ROWS, pixels - tile * ROWS)
    deviation = tl.where(mask, values - center[None, :], 0.0)
    out = (sample * tiles + tile) * channels + col
    tl.store(mean + out, center, col < channels)
    tl.store(squares + out, tl.sum(deviation * deviation, 0), col < channels)


@triton.jit
def _chunk(i, sample, group, tiles, channels, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """Return where the sums of a group's channels are stored for CHUNK consecutive tiles, from tile `i * CHUNK` on.

    Each tile has one sum for each channel. The results are the indices of the tiles [CHUNK], and the offsets and the mask of
    the sums, each [CHUNK, PADDED]: the mask is False for columns beyond the WIDTH channels of the group.
    """
    tile, channel = i * CHUNK + tl.arange(0, CHUNK), tl.arange(0, PADDED)
    offsets = (sample * tiles + tile)[:, None] * channels + group * WIDTH + channel[None, :]
    return tile, offsets, (tile < tiles)[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def _group_moments(
    tile_mean, tile_squares, mean, rstd, eps, tiles, pixels, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0), tl.program_id(1)
    sums = tl.zeros([CHUNK, PADDED], tl.float32)
    for i in range(tl.cdiv(tiles, CHUNK)):
        tile, offsets, mask = _chunk(i, sample, group, tiles, channels, WIDTH, PADDED, CHUNK)
        rows = tl.minimum(ROWS, pixels - tile * ROWS)[:, None]
        sums += rows * tl.load(tile_mean + offsets, mask, 0.0)
    count = pixels * WIDTH
    center = tl.sum(sums) / count
    # Squared deviations from the group's mean, computed from those from the tiles' means to avoid cancellation (Chan et
    # al. 1979).
    squares = tl.zeros([CHUNK, PADDED], tl.float32)
    for i in range(tl.cdiv(tiles, CHUNK)):
        tile, offsets, mask = _chunk(i, sample, group, tiles, channels, WIDTH, PADDED, CHUNK)
        rows = tl.minimum(ROWS, pixels - tile * ROWS)[:, None]
        shift = tl.load(tile_mean + offsets, mask, 0.0) - center
        squares += tl.where(mask, tl.load(tile_squares + offsets, mask, 0.0) + rows * shift * shift, 0.0)
    out = sample * tl.num_programs(1) + group
    tl.store(mean + out, center)
    tl.store(rstd + out, 1 / tl.sqrt(tl.sum(squares) / count + eps))


@triton.jit
def _channel_constants(sample, col, channels, mean, rstd, weight, bias, WIDTH: tl.constexpr):
    """Return mean and 1 / standard deviation of the group, weight and bias for each channel in `col`, each [1, COLS]."""
    inside = col < channels
    group = sample * (channels // WIDTH) + col // WIDTH
    return (
        tl.load(mean + group, inside, 0.0)[None, :],
        tl.load(rstd + group, inside, 0.0)[None, :],
        tl.load(weight + col, inside, 0.0).to(tl.float32)[None, :],
        tl.load(bias + col, inside, 0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _normalise(
    x, weight, bias, mean, rstd, y, tiles, pixels, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    sample, _, col, offsets, mask = _tile(tiles, pixels, channels, ROWS, COLS)
    center, scale, w, b = _channel_constants(sample, col, channels, mean, rstd, weight, bias, WIDTH)
    z = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - center) * (scale * w) + b
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask)


@triton.jit
def _through_silu(
    dy, x, weight, bias, mean, rstd, sample, col, offsets, mask, channels, WIDTH: tl.constexpr, SILU: tl.constexpr
):
    """Return the gradient of SiLU's input and the normalised x of a tile, and each channel's 1 / deviation and weight."""
    center, scale, w, b = _channel_constants(sample, col, channels, mean, rstd, weight, bias, WIDTH)
    normal = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - center) * scale
    dz = tl.load(dy + offsets, mask, 0.0).to(tl.float32)
    if SILU:
        z = normal * w + b
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return dz, normal, scale, w


@triton.jit
def _channel_gradients(
    dy, x, weight, bias, mean, rstd, sum_dz, sum_dzx, tiles, pixels, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    sample, tile, col, offsets, mask = _tile(tiles, pixels, channels, ROWS, COLS)
    dz, normal, _, _ = _through_silu(
        dy, x, weight, bias, mean, rstd, sample, col, offsets, mask, channels, WIDTH, SILU
    )  # fmt: skip
    out = (sample * tiles + tile) * channels + col
    tl.store(sum_dz + out, tl.sum(dz, 0), col < channels)  # dz is 0 outside of the tile
    tl.store(sum_dzx + out, tl.sum(dz * normal, 0), col < channels)


@triton.jit
def _group_gradients(
    tile_dz, tile_dzx, weight, sum_dz, sum_dzx, mean_dx, mean_dxx, tiles, pixels, channels,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0), tl.program_id(1)
    dz, dzx = tl.zeros([CHUNK, PADDED], tl.float32), tl.zeros([CHUNK, PADDED], tl.float32)
    for i in range(tl.cdiv(tiles, CHUNK)):
        _, offsets, mask = _chunk(i, sample, group, tiles, channels, WIDTH, PADDED, CHUNK)
        dz += tl.load(tile_dz + offsets, mask, 0.0)
        dzx += tl.load(tile_dzx + offsets, mask, 0.0)
    channel = tl.arange(0, PADDED)
    inside, col = channel < WIDTH, group * WIDTH + channel
    w = tl.load(weight + col, inside, 0.0).to(tl.float32)
    channel_dz, channel_dzx = tl.sum(dz, 0), tl.sum(dzx, 0)
    tl.store(sum_dz + sample * channels + col, channel_dz, inside)
    tl.store(sum_dzx + sample * channels + col, channel_dzx, inside)
    out, count = sample * tl.num_programs(1) + group, pixels * WIDTH
    tl.store(mean_dx + out, tl.sum(w * channel_dz) / count)
    tl.store(mean_dxx + out, tl.sum(w * channel_dzx) / count)


@triton.jit
def _input_gradient(
    dy, x, weight, bias, mean, rstd, mean_dx, mean_dxx, dx, tiles, pixels, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    sample, _, col, offsets, mask = _tile(tiles, pixels, channels, ROWS, COLS)
    dz, normal, scale, w = _through_silu(
        dy, x, weight, bias, mean, rstd, sample, col, offsets, mask, channels, WIDTH, SILU
    )  # fmt: skip
    group = sample * (channels // WIDTH) + col // WIDTH
    first = tl.load(mean_dx + group, col < channels, 0.0)[None, :]
    second = tl.load(mean_dxx + group, col < channels, 0.0)[None, :]
    out = scale * (w * dz - first - normal * second)
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask)


def group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Return `group_norm(x)`, or `silu(group_norm(x))`, [B, C, H, W] in channels-last memory and the dtype of x.

    Forward and backward pass are Triton kernels.

    Args:
        x_BCHW: feature map, float32 or bfloat16; copied if it is not channels last.
        weight_C: scale of each channel.
        bias_C: shift of each channel.
        groups: number of groups, which divides C.
        eps: added to the variance.
        silu: whether SiLU is applied to the result.
    """
    y_BCHW: Tensor = _forward(_channels_last(x_BCHW), weight_C, bias_C, groups, eps, silu)[0]
    return y_BCHW


def _channels_last(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last)


class _Sizes:
    """Launch grids, tile sizes and shapes of buffers of the kernels for one feature map."""

    def __init__(self, x_BCHW: Tensor, groups: int) -> None:
        self.samples, self.channels, height, width = x_BCHW.shape
        pixels, cols = height * width, min(_COLS, triton.next_power_of_2(self.channels))
        tiles, group_width = triton.cdiv(pixels, _ROWS), self.channels // groups
        self.map = (tiles, pixels, self.channels)
        self.per_tile = (self.samples, tiles, self.channels)
        self.tile_grid = (self.samples * tiles, triton.cdiv(self.channels, cols))
        self.group_grid = (self.samples, groups)
        self.tile = {"ROWS": _ROWS, "COLS": cols}
        self.group = {"WIDTH": group_width, "PADDED": triton.next_power_of_2(group_width), "CHUNK": _CHUNK}


@torch.library.custom_op("raphael::group_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [B, C, H, W], and mean and 1 / standard deviation of each of G groups, float32 [B, G]."""
    sizes, y = _Sizes(x, groups), torch.empty_like(x)
    tile_mean, tile_squares = x.new_empty(2, *sizes.per_tile, dtype=torch.float32).unbind()
    mean, rstd = (x.new_empty(sizes.group_grid, dtype=torch.float32) for _ in range(2))
    _channel_moments[sizes.tile_grid](x, tile_mean, tile_squares, *sizes.map, **sizes.tile)
    _group_moments[sizes.group_grid](
        tile_mean, tile_squares, mean, rstd, eps, *sizes.map, ROWS=_ROWS, **sizes.group, num_warps=1
    )
    _normalise[sizes.tile_grid](
        x, weight, bias, mean, rstd, y, *sizes.map, WIDTH=sizes.group["WIDTH"], SILU=silu, **sizes.tile
    )
    return y, mean, rstd


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("raphael::group_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of bias and weight for each sample, float32 [2, B, C]."""
    sizes, dx = _Sizes(x, groups), torch.empty_like(x)
    tile_dz, tile_dzx = x.new_empty(2, *sizes.per_tile, dtype=torch.float32).unbind()
    mean_dx, mean_dxx = (x.new_empty(sizes.group_grid, dtype=torch.float32) for _ in range(2))
    sums = x.new_empty(2, sizes.samples, sizes.channels, dtype=torch.float32)
    options = {"WIDTH": sizes.group["WIDTH"], "SILU": silu, **sizes.tile}
    known = (dy, x, weight, bias, mean, rstd)
    _channel_gradients[sizes.tile_grid](*known, tile_dz, tile_dzx, *sizes.map, **options)
    _group_gradients[sizes.group_grid](
        tile_dz, tile_dzx, weight, *sums.unbind(), mean_dx, mean_dxx, *sizes.map, **sizes.group, num_warps=1
    )
    _input_gradient[sizes.tile_grid](*known, mean_dx, mean_dxx, dx, *sizes.map, **options)
    return dx, sums


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, *x.shape[:2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # of mean and deviation, which have no gradient
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    dx, sums = _backward(_channels_last(dy), *ctx.saved_tensors, ctx.groups, ctx.silu)
    d_bias, d_weight = sums.sum(dim=1).to(ctx.saved_tensors[1].dtype).unbind()
    return dx, d_weight, d_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
