"""Numbers the (row, expert) pairs that a layer of experts computes, in Triton, without reading anything on the host.

| kernel | for a tile of rows and each expert |
|---|---|
| `_count` | number of pairs |
| `_number` | number of each pair, from the number of pairs of all tiles and experts before it |

Legend: R rows (tokens), K experts, P largest number of pairs, T tiles of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024  # rows of a tile


class Pairs(NamedTuple):
    """The (row, expert) pairs to compute, for R rows (tokens) and K experts, numbered by expert and then row.

    P is an upper bound of the number of pairs. Buffers are that long, so that shapes do not depend on the number of pairs.

    Attributes:
        row_P: row of each pair, int32. Entries after the last pair have no meaning.
        place_RK: number of the pair (r, k), int32; -1 if it is not to be computed.
        ends_K: for each expert, the number of pairs of this expert and all experts before it, int32.
    """

    row_P: Tensor
    place_RK: Tensor
    ends_K: Tensor


@triton.jit
def _needed(w, rows, expert, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return the indices of the rows in this Triton program's tile [ROWS], and 1 for each row that needs the expert, else 0.

    A row (token) needs the expert if the expert's weight in `w` is above 0.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row, (tl.load(w + row * EXPERTS + expert, row < rows, 0.0) > 0).to(tl.int32)


@triton.jit
def _count(w, counts, rows, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    for k in tl.static_range(EXPERTS):
        _, needed = _needed(w, rows, k, EXPERTS, ROWS)
        tl.store(counts + k * tl.num_programs(0) + tl.program_id(0), tl.sum(needed, 0))


@triton.jit
def _number(w, sums, row_of_pair, place, ends, rows, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    tiles, tile = tl.num_programs(0), tl.program_id(0)
    for k in tl.static_range(EXPERTS):
        row, needed = _needed(w, rows, k, EXPERTS, ROWS)
        before = tl.load(sums + k * tiles + tile - 1, k * tiles + tile > 0, 0)
        number = before + tl.cumsum(needed, 0) - 1
        tl.store(place + row * EXPERTS + k, tl.where(needed > 0, number, -1), row < rows)
        tl.store(row_of_pair + number, row, needed > 0)
        tl.store(ends + k, tl.load(sums + k * tiles + tiles - 1), tile == 0)


def find_pairs(w_RK: Tensor, per_row: int) -> Pairs:
    """Number the (row, expert) pairs whose weight in `w_RK` is above 0.

    `per_row`: upper bound of the number of such pairs in a row. Buffers of the result have P = R * per_row entries.
    """
    return Pairs(*_find_pairs(w_RK.detach().contiguous(), per_row))


@torch.library.custom_op("raphael::find_pairs", mutates_args=())
def _find_pairs(w: Tensor, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, experts), (row_of_pair, place, ends) = w.shape, _buffers(w, per_row)
    tiles = triton.cdiv(rows, _ROWS)
    counts = ends.new_empty(experts * tiles)
    _count[(tiles,)](w, counts, rows, EXPERTS=experts, ROWS=_ROWS)
    sums = counts.cumsum(0, dtype=torch.int32)
    _number[(tiles,)](w, sums, row_of_pair, place, ends, rows, EXPERTS=experts, ROWS=_ROWS)
    return row_of_pair, place, ends


def _buffers(w: Tensor, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, experts = w.shape
    row_of_pair, place, ends = (w.new_empty(n, dtype=torch.int32) for n in (rows * per_row, rows * experts, experts))
    return row_of_pair, place.view(rows, experts), ends


@_find_pairs.register_fake
def _(w: Tensor, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    return _buffers(w, per_row)
