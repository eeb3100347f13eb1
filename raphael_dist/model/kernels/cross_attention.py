"""Cross-attention to a caption in Triton, forward and backward pass. The attention map is a second output.

For each head, `out = P v` with P = softmax(q k^T scale). The attention map is the mean of P over the heads (Sec. 3.1). A
caption has few tokens, so a row of P fits into one tile. P is computed in registers, head after head, in both passes; it is
never stored for single heads. Products have the dtype of q, all sums are float32 and in a fixed order. A chunk is the
consecutive tiles of image tokens over which one program of `_text_gradients` sums; torch adds the sums of all chunks.

| kernel | grid | writes |
|---|---|---|
| `_attend` | (tiles of image tokens, samples) | out, map |
| `_query_gradient` | (tiles of image tokens, samples and heads) | dq |
| `_text_gradients` | (chunks of tiles, samples and heads) | sums for dk and dv over the tiles of a chunk |

Legend: B samples, N image tokens, Y text tokens, D width of all heads; dP = dout v^T + dmap / heads, and S = q k^T scale.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from raphael_dist.model.kernels.products import factor_type

_PROGRAMS = 128  # of `_text_gradients`, about one for each multiprocessor


@triton.jit
def _tile(row, rows, width, HEAD: tl.constexpr, DIM: tl.constexpr):
    """Return offsets and mask of the numbers of one head in some rows (tokens) of a sample, each [ROWS, DIM].

    `row`: indices of these rows, [ROWS]. The sample has `rows` rows of `width` numbers, fewer than 2^31 in all. A head has
    HEAD numbers; the mask is False for the columns from HEAD to DIM.
    """
    dim = tl.arange(0, DIM)
    return row[:, None] * width + dim[None, :], (row < rows)[:, None] & (dim < HEAD)[None, :]


@triton.jit
def _dot(a, b):
    # Of float32 numbers: three products of their halves on tensor cores, which keep float32's digits.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _probabilities(q, k, word, words, scale):
    """Return P = softmax(q k^T scale) of one head for q [ROWS, DIM] and k [WORDS, DIM], float32 [ROWS, WORDS].

    `word`: indices of the text tokens, [WORDS]. `words`: number of text tokens. P is 0 where `word` is not below `words`.
    """
    logits = tl.where((word < words)[None, :], _dot(q, tl.trans(k)) * scale, -float("inf"))
    values = tl.exp(logits - tl.max(logits, 1)[:, None])
    return values / tl.sum(values, 1)[:, None]


@triton.jit
def _attend(
    q, k, v, out, attention, tokens, words, width, scale, HEADS: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr,
    WORDS: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    row, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)
    at_q, mask_q = _tile(row, tokens, width, HEAD, DIM)
    at_k, mask_k = _tile(word, words, width, HEAD, DIM)
    first_q, first_k = sample * tokens * width, sample * words * width
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for _ in range(HEADS):
        q_head, k_head = tl.load(q + first_q + at_q, mask_q, 0.0), tl.load(k + first_k + at_k, mask_k, 0.0)
        p = _probabilities(q_head.to(DOT), k_head.to(DOT), word, words, scale)
        total += p
        value = _dot(p.to(DOT), tl.load(v + first_k + at_k, mask_k, 0.0).to(DOT))
        tl.store(out + first_q + at_q, value.to(out.dtype.element_ty), mask_q)
        first_q += HEAD
        first_k += HEAD
    offsets = row[:, None] * words + word[None, :]
    mask = (row < tokens)[:, None] & (word < words)[None, :]
    tl.store(attention + sample * tokens * words + offsets, total / HEADS, mask)


@triton.jit
def _query_gradient(
    dout, dmap, q, k, v, dq, tokens, words, width, scale, HEADS: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr,
    WORDS: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1) % HEADS, (tl.program_id(1) // HEADS).to(tl.int64)
    row, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)
    at_q, mask_q = _tile(row, tokens, width, HEAD, DIM)
    at_k, mask_k = _tile(word, words, width, HEAD, DIM)
    first_q, first_k = sample * tokens * width + head * HEAD, sample * words * width + head * HEAD
    k_head = tl.load(k + first_k + at_k, mask_k, 0.0).to(DOT)
    p = _probabilities(tl.load(q + first_q + at_q, mask_q, 0.0).to(DOT), k_head, word, words, scale)
    v_head = tl.load(v + first_k + at_k, mask_k, 0.0).to(DOT)
    dp = _dot(tl.load(dout + first_q + at_q, mask_q, 0.0).to(DOT), tl.trans(v_head))
    if dmap is not None:
        offsets, mask = row[:, None] * words + word[None, :], (row < tokens)[:, None] & (word < words)[None, :]
        dp += tl.load(dmap + sample * tokens * words + offsets, mask, 0.0) / HEADS
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(DOT)
    tl.store(dq + first_q + at_q, _dot(ds, k_head).to(dq.dtype.element_ty), mask_q)


@triton.jit
def _text_gradients(
    dout, dmap, q, k, v, dk_parts, dv_parts, tokens, words, width, scale, tiles, KEYS: tl.constexpr, VALUES: tl.constexpr,
    HEADS: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, WORDS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1) % HEADS
    sample, samples = (tl.program_id(1) // HEADS).to(tl.int64), tl.num_programs(1) // HEADS
    word = tl.arange(0, WORDS)
    at_k, mask_k = _tile(word, words, width, HEAD, DIM)
    first_q, first_k = sample * tokens * width + head * HEAD, sample * words * width + head * HEAD
    k_head = tl.load(k + first_k + at_k, mask_k, 0.0).to(DOT)
    v_head = tl.load(v + first_k + at_k, mask_k, 0.0).to(DOT)
    dk, dv = tl.zeros([WORDS, DIM], tl.float32), tl.zeros([WORDS, DIM], tl.float32)
    for i in range(tiles):
        row = (chunk * tiles + i) * ROWS + tl.arange(0, ROWS)
        at_q, mask_q = _tile(row, tokens, width, HEAD, DIM)
        q_head = tl.load(q + first_q + at_q, mask_q, 0.0).to(DOT)
        d_head = tl.load(dout + first_q + at_q, mask_q, 0.0).to(DOT)
        # Transposed: [WORDS, ROWS], as the products below read them.
        logits = tl.where((word < words)[:, None], _dot(k_head, tl.trans(q_head)) * scale, -float("inf"))
        p = tl.exp(logits - tl.max(logits, 0)[None, :])
        p /= tl.sum(p, 0)[None, :]
        if VALUES:
            dv += _dot(p.to(DOT), d_head)
        if KEYS:
            dp = _dot(v_head, tl.trans(d_head))
            if dmap is not None:
                offsets, mask = row[None, :] * words + word[:, None], (row < tokens)[None, :] & (word < words)[:, None]
                dp += tl.load(dmap + sample * tokens * words + offsets, mask, 0.0) / HEADS
            ds = p * (dp - tl.sum(p * dp, 0)[None, :]) * scale
            dk += _dot(ds.to(DOT), q_head)
    first = 2 * chunk.to(tl.int64) * samples * words * width + first_k  # dk and dv of a chunk are neighbours
    if KEYS:
        tl.store(dk_parts + first + at_k, dk, mask_k)
    if VALUES:
        tl.store(dv_parts + first + at_k, dv, mask_k)


def cross_attention(q_BND: Tensor, k_BYD: Tensor, v_BYD: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention of N image tokens to Y text tokens, and the attention map, differentiably.

    Args:
        q_BND: queries, float32 or bfloat16. Heads are consecutive slices of the width D.
        k_BYD: keys, in the dtype of the queries; up to 128 text tokens, and up to 64 numbers in a head.
        v_BYD: values, in the dtype of the queries.
        heads: number of heads, which divides D.
        scale: factor on the products of queries and keys.

    Returns:
        The output [B, N, D], in the dtype of the queries, and the attention of each image token to each text token, averaged
        over the heads, float32 [B, N, Y].
    """
    out_BND, map_BNY = _forward(q_BND.contiguous(), k_BYD.contiguous(), v_BYD.contiguous(), heads, scale)
    return out_BND, map_BNY


def _rows(q: Tensor) -> int:
    return 16 if q.dtype == torch.float32 else 32


def _constants(q: Tensor, k: Tensor, heads: int) -> dict[str, Any]:
    """Return the constants that Triton compiles into the kernels, and the launch options.

    DIM and WORDS are at least 16, because `tl.dot` requires matrices with sides of at least 16.
    """
    head = q.shape[2] // heads
    return {
        "HEADS": heads,
        "HEAD": head,
        "DIM": max(16, triton.next_power_of_2(head)),
        "WORDS": max(16, triton.next_power_of_2(k.shape[1])),
        "DOT": factor_type(q),
        "ROWS": _rows(q),
        "num_warps": 8,
        "num_stages": 1,  # one tile of keys at a time, and no loop over them
    }


@torch.library.custom_op("raphael::cross_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    (samples, tokens, width), words, constants = q.shape, k.shape[1], _constants(q, k, heads)
    out, attention = torch.empty_like(q), q.new_empty(samples, tokens, words, dtype=torch.float32)
    _attend[(triton.cdiv(tokens, constants["ROWS"]), samples)](
        q, k, v, out, attention, tokens, words, width, scale, **constants
    )  # fmt: skip
    return out, attention


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(*q.shape[:2], k.shape[1], dtype=torch.float32)


@torch.library.custom_op("raphael::cross_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, dmap: Tensor | None, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of q, and the gradients of k and v as float32 [chunks, 2, B, Y, D].

    The caller adds up the gradients of k and v over the chunks (groups of image tokens).
    """
    (samples, tokens, width), words, constants = q.shape, k.shape[1], _constants(q, k, heads)
    dq, parts, tiles = torch.empty_like(q), _parts(q, k, heads), _chunks(q, heads)[1]
    sizes, heads_of_all = (tokens, words, width, scale), samples * heads
    _query_gradient[(triton.cdiv(tokens, constants["ROWS"]), heads_of_all)](dout, dmap, q, k, v, dq, *sizes, **constants)
    # Float32 numbers of both gradients need more registers than there are.
    for keys, values in ((True, False), (False, True)) if q.dtype == torch.float32 else ((True, True),):
        _text_gradients[(len(parts), heads_of_all)](
            dout, dmap, q, k, v, *parts.unbind(1), *sizes, tiles, KEYS=keys, VALUES=values, **constants
        )
    return dq, parts


def _chunks(q: Tensor, heads: int) -> tuple[int, int]:
    """Return the number of chunks into which the image tokens of a sample are divided, and the number of tiles in a chunk.

    A program of the kernel `_text_gradients` processes one chunk.
    """
    tiles = triton.cdiv(q.shape[1], _rows(q))
    of_chunk = triton.cdiv(tiles * q.shape[0] * heads, _PROGRAMS)
    return triton.cdiv(tiles, min(of_chunk, tiles)), min(of_chunk, tiles)


def _parts(q: Tensor, k: Tensor, heads: int) -> Tensor:
    return q.new_empty(_chunks(q, heads)[0], 2, *k.shape, dtype=torch.float32)


@_backward.register_fake
def _(dout: Tensor, dmap: Tensor | None, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _parts(q, k, heads)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.heads, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # the map has a gradient only if edges are predicted from it
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor | None, dmap: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    dout = torch.zeros_like(q) if dout is None else dout.contiguous()
    dq, parts = _backward(dout, None if dmap is None else dmap.contiguous(), q, k, v, ctx.heads, ctx.scale)
    dk, dv = parts.sum(dim=0).to(k.dtype).unbind()
    return dq, dk, dv, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.raphael.cross_attention)
def _flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 4 * q.numel() * k[1]


@register_flop_formula(torch.ops.raphael.cross_attention_backward)
def _backward_flops(dout: torch.Size, dmap: object, q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 10 * q.numel() * k[1]
