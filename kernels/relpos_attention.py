"""Transformer-XL relative attention: a flash kernel forward, a scratch of weights and score gradients backward.

S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos[T-1-i+j]) / sqrt(D).  The second term needs, for a tile of M queries
from i0 and N keys from j0, a parallelogram of products (i, position), not a rectangle.

The shift is a rotation.  Let R_t[i, c] = (q_i + v_bias) . pos[T-1-i0+j0 + c], c < N, a dense product for the key tile t at
j0.  Element (i, j) of the tile (indices local to it) is in column j-i of R_t, or, where that is negative, in column
j-i+N of R_{t-1}, or j-i+2N of R_{t-2}: always column (j-i) mod N.  So the rows of each R are rotated once, and the
result serves this tile and the next M/N: walking along the keys costs one product and one rotation a tile, no more
MMA work than the content term.

Alternatives for the forward (sm_90, bf16, D = 64, 4 warps, Triton 3.6, every tile masked; instructions in the loop are for
64 x 64 scores; compiled, not timed):

                                                     registers  spilled  shared KiB  instructions
  no positions at all                                      120     0 B          40           436
  rotation, 64 x 32 tiles (this file)                      183     0 B          40           782
  rotation, 64 x 64 tiles                                  255   0-88 B         72           765
  rotation, 64 x 64, R rounded to fp16 for it              255     0 B          60           840
  rotation, 64 x 128 tiles                                 255  1168 B         144             -
  gather through shared memory by flat index               255    40 B          72           740, with bank conflicts
  the whole band again for every tile (64 x 128, gather)   255   136 B         112          1215

Dropout is drawn by a kernel of its own, one bit a score: Philox inside the loop takes 50% more instructions there and a
barrier for each rearrangement of its words.  The backward draws again; saved, the bits of a loop at (32, 1500) with four
heads are 38 MB.

Backward, chunk by chunk of heads, no atomics, and the same bits every time:
  _backward_scores    one program per query tile, walks the keys:  W (dropped weights) and dS, [T, T] each, to a scratch
  _backward_query     dq = dS k + dR pos; column sums of the two parts: partial du, dv_bias
  _backward_key       dk = dS' (q + u), dv = W' dout
  _backward_position  dpos = sum over utterances of dR' (q + v_bias)
dR[i, T-1-i+j] = dS[i, j] is the scratch read with a pitch one larger: the relative shift backwards costs unaligned loads and
no instructions.  A chunk is what fits the L2, or more heads where those would not fill the GPU (`_heads_at_a_time`).

The loops as compiled (sm_90, bf16, D = 64, Triton 3.9; instructions, tensor-core units and barriers for 64 x 32 scores), and
those of the flash kernels that recomputed S for each of dq, dk and dpos:

                                  with dropout           without
  forward                      468   10 MMA   5 bar    403   10 MMA   5 bar
  _backward_scores             500   12        8       391   12        8
  _backward_query               81 + 148, 2 + 2, 2 + 2, content and position
  _backward_key                124    4        2
  _backward_position           155    2        2
  before: forward              707   10       14       442   10        5
  before: backward, dq alone   917   16       18       630   16        9
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    AotConfig,
    LaunchConfig,
    aot_config,
    arch_of,
    cdiv,
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    launch,
    nearest_arch,
    next_power_of_2,
    product_precision,
    unit_stride,
)
from .tuning import tuned

__all__ = ["aot_configs", "backward", "config_for", "forward"]

# what changes with T or B: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("T", "rows", "threshold", "first_head", "heads")


@triton.jit
def _sequence(b, T, lengths_ptr, cu_seqlens_ptr):
    """Return, for utterance b: first row within its batch entry, first row of all, number of queries, number of keys."""
    b = tl.cast(b, tl.int64)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        first = start
        queries = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
        keys = queries
    else:
        start = b * 0
        first = b * T
        queries = T
        keys = T
        if lengths_ptr is not None:
            keys = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)
    return start, first, queries, keys


@triton.jit
def _head(ptr, b, start, h, stride_b, stride_t, stride_h):
    """Return a pointer to the first row of one head of one utterance."""
    return ptr + tl.cast(b, tl.int64) * stride_b + start * stride_t + tl.cast(h, tl.int64) * stride_h


@triton.jit
def _inside(row, rows, BLOCK: tl.constexpr):
    # one unsigned comparison for 0 <= row + i < rows
    return (row + tl.arange(0, BLOCK)).to(tl.uint32, bitcast=True) < tl.cast(rows, tl.uint32)


@triton.jit
def _load_tile(
    base, row, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True
):
    """Rows row ... row+BLOCK-1 of a matrix with `rows` rows, zeros outside; not MASKED: all are inside: [BLOCK, BLOCK_D]."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    # the tile's offset in 64 bits, those inside the tile in 32
    address = base + tl.cast(row, tl.int64) * stride + i[:, None] * stride + d[None, :]
    if MASKED:
        mask = _inside(row, rows, BLOCK)[:, None]
        if D < BLOCK_D:
            mask = mask & (d < D)[None, :]
        return tl.load(address, mask=mask, other=0.0)
    elif D < BLOCK_D:
        return tl.load(address, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _store_tile(base, row, rows, stride, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = _inside(row, rows, BLOCK)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    address = base + tl.cast(row, tl.int64) * stride + i[:, None] * stride + d[None, :]
    tl.store(address, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_rows(base, row, rows, other, BLOCK: tl.constexpr):
    return tl.load(base + row + tl.arange(0, BLOCK), mask=_inside(row, rows, BLOCK), other=other)


@triton.jit
def _add_bias(x, bias_ptr, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x + bias[h], rounded to the dtype of x as the reference does: [BLOCK, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + h * D + d, mask=d < D, other=0.0)
    return (x.to(tl.float32) + bias.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def _padded(T):
    """T rounded up to whole tiles: the pitch of the dropout words and of the scratch."""
    return (T + 63) // 64 * 64


# --- dropout ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _draw(
    seed_ptr, keep_ptr, lengths_ptr, cu_seqlens_ptr, T, H, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Dropout decisions of common.dropout_keep, one bit a score: bit j % 32 of the word at [b * H + h, j // 32, i]."""
    row_tiles = tl.cdiv(T, BLOCK_M)
    column_tiles = tl.cdiv(T, BLOCK_N)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    bh = tl.program_id(0) // (row_tiles * column_tiles)
    i0 = tile // column_tiles * BLOCK_M
    j0 = tile % column_tiles * BLOCK_N
    _, _, queries, keys = _sequence(bh // H, T, lengths_ptr, cu_seqlens_ptr)
    if (i0 < queries) & (j0 < keys):
        i = i0 + tl.arange(0, BLOCK_M)
        keep = dropout_keep(tl.load(seed_ptr), 0, bh, i, j0, threshold, BLOCK_N)
        keep = tl.reshape(keep.to(tl.int32), (BLOCK_M, BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = j0 // 32 + tl.arange(0, BLOCK_N // 32)
        pitch = _padded(T)
        address = keep_ptr + bh.to(tl.int64) * (pitch // 32) * pitch + word[None, :] * pitch + i[:, None]
        tl.store(address, tl.sum(keep, 2), mask=(word < pitch // 32)[None, :])


@triton.jit
def _kept(keep_base, row, j0, T, M: tl.constexpr, N: tl.constexpr):
    """Decisions for the scores [M, N] from (row, j0); N is at most 32 and divides j0; keep_base is that of the head."""
    word = tl.load(keep_base + (j0 // 32) * _padded(T) + row + tl.arange(0, M))
    return (word[:, None] & (1 << (j0 % 32 + tl.arange(0, N)))[None, :]) != 0


# --- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rotated_scores(
    qv, pos_base, row, T, stride, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr = True,
):  # fmt: skip
    """R for the positions row ... row+N-1, its rows rotated: [M, N] with R[i, (j-i) mod N] at (i, j)."""
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    p = _load_tile(pos_base, row, 2 * T - 1, stride, D, N, BLOCK_D, MASKED)
    return tl.gather(tl.dot(qv, tl.trans(p), input_precision=PRECISION), (j - i) & (N - 1), 1)


@triton.jit
def _age(M: tl.constexpr, N: tl.constexpr):
    """Which of R_t, R_{t-1}, R_{t-2} a score is in: [M, N]."""
    return (tl.arange(0, M)[:, None] - tl.arange(0, N)[None, :] + N - 1) // N


@triton.jit
def _first_scores(
    qv, pos_base, i0, T, stride_pt, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_scores` carries into the first key tile: R_{-1} merged into R_{-2} where the next tile reads it, and R_{-1}."""
    latest = _rotated_scores(qv, pos_base, T - 1 - i0 - N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
    older = _rotated_scores(qv, pos_base, T - 1 - i0 - 2 * N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
    return tl.where(_age(M, N) == 2, older, latest), latest


@triton.jit
def _scores(
    qu, qv, k_base, pos_base, older, latest, i0, j0, keys, stride_kt, stride_pt, T,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """S [M, N] from (i0, j0) without 1/sqrt(D), and what the next key tile takes over."""
    age = _age(M, N)
    r = _rotated_scores(qv, pos_base, T - 1 - i0 + j0, T, stride_pt, D, M, N, BLOCK_D, PRECISION, MASKED)
    s = tl.where(age == 0, r, older)
    k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D, MASKED)
    s = tl.dot(qu, tl.trans(k), s, input_precision=PRECISION)
    return s, tl.where(age == 2, latest, r), r


@triton.jit
def _forward_tile(
    qu, qv, k_base, v_base, pos_base, keep_base, m, denominator, acc, older, latest, i0, j0, keys,
    stride_kt, stride_vt, stride_pt, T, scale, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax; not MASKED: all of its keys are there."""
    s, older, latest = _scores(
        qu, qv, k_base, pos_base, older, latest, i0, j0, keys, stride_kt, stride_pt, T,
        D, M, N, BLOCK_D, PRECISION, MASKED,
    )  # fmt: skip
    if MASKED:
        s = tl.where(_inside(j0, keys, N)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    w = tl.math.exp2(s * scale - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    denominator = denominator * alpha + tl.sum(w, 1)
    if HAS_DROPOUT:
        w = tl.where(_kept(keep_base, i0, j0, T, M, N), w, 0.0)
    v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D, MASKED)
    acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, denominator, acc, older, latest


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, out_ptr, lse_ptr, lengths_ptr, cu_seqlens_ptr, keep_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_pt, stride_ph,
    T, H, rows, scale, keep_scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = 2 * BLOCK_N
    N: tl.constexpr = BLOCK_N
    HAS_DROPOUT: tl.constexpr = keep_ptr is not None
    # a second copy of the loop, for which float32 and wide heads would spill
    FULL_TILES: tl.constexpr = q_ptr.dtype.element_ty != tl.float32 and BLOCK_D <= 64
    tiles = tl.cdiv(T, M)
    i0 = tl.program_id(0) % tiles * M
    bh = tl.program_id(0) // tiles
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        scale = tl.cast(scale, tl.float32)
        k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
        v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
        q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        keep_base = keep_ptr
        if HAS_DROPOUT:
            keep_base += bh.to(tl.int64) * (_padded(T) // 32) * _padded(T)
        q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)

        older, latest = _first_scores(qv, pos_base, i0, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        m = tl.full((M,), float("-inf"), tl.float32)
        denominator = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, BLOCK_D), tl.float32)
        full = 0
        if FULL_TILES:
            full = keys // N * N
            for j0 in range(0, full, N):
                m, denominator, acc, older, latest = _forward_tile(
                    qu, qv, k_base, v_base, pos_base, keep_base, m, denominator, acc, older, latest, i0, j0, keys,
                    stride_kt, stride_vt, stride_pt, T, scale, HAS_DROPOUT, D, M, N, BLOCK_D, PRECISION, False,
                )  # fmt: skip
        for j0 in tl.range(full, keys, N, num_stages=1 if FULL_TILES else 2):
            m, denominator, acc, older, latest = _forward_tile(
                qu, qv, k_base, v_base, pos_base, keep_base, m, denominator, acc, older, latest, i0, j0, keys,
                stride_kt, stride_vt, stride_pt, T, scale, HAS_DROPOUT, D, M, N, BLOCK_D, PRECISION, True,
            )  # fmt: skip

        # no key, no weight: zeros
        some = denominator > 0
        denominator = tl.where(some, denominator, 1.0)
        norm = 1.0 / denominator
        if HAS_DROPOUT:
            norm = norm * tl.cast(keep_scale, tl.float32)
        _store_tile(out_ptr + (first * H + h) * D, i0, queries, H * D, acc * norm[:, None], D, M, BLOCK_D)
        lse = tl.where(some, m, 0.0) + tl.math.log2(denominator)
        i = tl.arange(0, M)
        tl.store(lse_ptr + h.to(tl.int64) * rows + first + i0 + i, lse, mask=_inside(i0, queries, M))


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _store_scratch(base, i0, j0, pitch, x, M: tl.constexpr, N: tl.constexpr):
    # padded to whole tiles: no mask
    address = base + tl.cast(i0, tl.int64) * pitch + tl.arange(0, M)[:, None] * pitch + j0 + tl.arange(0, N)[None, :]
    tl.store(address, x.to(base.dtype.element_ty))


@triton.jit
def _backward_tile(
    qu, qv, dout, lse, delta, k_base, v_base, pos_base, keep_base, weights_base, ds_base, older, latest, i0, j0, keys,
    stride_kt, stride_vt, stride_pt, T, scale, keep_scale, HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write the dropped weights and dS, up to the factor 1/sqrt(D), of one key tile; not MASKED: all keys are there."""
    s, older, latest = _scores(
        qu, qv, k_base, pos_base, older, latest, i0, j0, keys, stride_kt, stride_pt, T,
        D, M, N, BLOCK_D, PRECISION, MASKED,
    )  # fmt: skip
    v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D, MASKED)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    w = tl.math.exp2(s * scale - lse[:, None])
    if MASKED:
        w = tl.where(_inside(j0, keys, N)[None, :], w, 0.0)
    dropped = w
    if HAS_DROPOUT:
        keep = _kept(keep_base, i0, j0, T, M, N)
        dropped = tl.where(keep, w * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    _store_scratch(weights_base, i0, j0, _padded(T), dropped, M, N)
    _store_scratch(ds_base, i0, j0, _padded(T), w * (dp - delta[:, None]), M, N)
    return older, latest


@triton.jit(do_not_specialize=RUNTIME)
def _backward_scores(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, out_ptr, dout_ptr, lse_ptr, lengths_ptr, cu_seqlens_ptr, keep_ptr,
    weights_ptr, ds_ptr, qu_ptr, qv_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    first_head, T, H, rows, scale, keep_scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the scratch of the heads from first_head on, for the queries there are.

    weights_ptr, ds_ptr [heads, padded T, padded T]: zeros from the last key to a multiple of 64, nothing beyond;
    qu_ptr, qv_ptr [heads, padded T, D]: q + u and q + v_bias.
    """
    M: tl.constexpr = 2 * BLOCK_N
    N: tl.constexpr = BLOCK_N
    HAS_DROPOUT: tl.constexpr = keep_ptr is not None
    # a second copy of the loop, for which float32 and wide heads would spill
    FULL_TILES: tl.constexpr = q_ptr.dtype.element_ty != tl.float32 and BLOCK_D <= 64
    tiles = tl.cdiv(T, M)
    i0 = tl.program_id(0) % tiles * M
    slot = tl.program_id(0) // tiles
    bh = first_head + slot
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        scale = tl.cast(scale, tl.float32)
        keep_scale = tl.cast(keep_scale, tl.float32)
        k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
        v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
        q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
        dout_base = _head(dout_ptr, b, start, h, stride_ob, stride_ot, stride_oh)
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        pitch = _padded(T)
        weights_base = weights_ptr + slot.to(tl.int64) * pitch * pitch
        ds_base = ds_ptr + slot.to(tl.int64) * pitch * pitch
        keep_base = keep_ptr
        if HAS_DROPOUT:
            keep_base += bh.to(tl.int64) * (pitch // 32) * pitch
        q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
        _store_tile(qu_ptr + slot.to(tl.int64) * pitch * D, i0, pitch, D, qu, D, M, BLOCK_D)
        _store_tile(qv_ptr + slot.to(tl.int64) * pitch * D, i0, pitch, D, qv, D, M, BLOCK_D)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, M, BLOCK_D)
        out = _load_tile(out_ptr + (first * H + h) * D, i0, queries, H * D, D, M, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        # beyond the last query: weights of zero
        lse = _load_rows(lse_ptr + h.to(tl.int64) * rows + first, i0, queries, float("inf"), M)

        older, latest = _first_scores(qv, pos_base, i0, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        full = 0
        if FULL_TILES:
            full = keys // N * N
            for j0 in range(0, full, N):
                older, latest = _backward_tile(
                    qu, qv, dout, lse, delta, k_base, v_base, pos_base, keep_base, weights_base, ds_base, older, latest,
                    i0, j0, keys, stride_kt, stride_vt, stride_pt, T, scale, keep_scale, HAS_DROPOUT,
                    D, M, N, BLOCK_D, PRECISION, False,
                )  # fmt: skip
        for j0 in tl.range(full, keys, N, num_stages=1 if FULL_TILES else 2):
            older, latest = _backward_tile(
                qu, qv, dout, lse, delta, k_base, v_base, pos_base, keep_base, weights_base, ds_base, older, latest,
                i0, j0, keys, stride_kt, stride_vt, stride_pt, T, scale, keep_scale, HAS_DROPOUT,
                D, M, N, BLOCK_D, PRECISION, True,
            )  # fmt: skip
        for j0 in range((keys + N - 1) // N * N, _padded(keys), N):
            _store_scratch(weights_base, i0, j0, pitch, tl.zeros((M, N), tl.float32), M, N)
            _store_scratch(ds_base, i0, j0, pitch, tl.zeros((M, N), tl.float32), M, N)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_query(
    k_ptr, pos_ptr, ds_ptr, dq_ptr, du_ptr, dv_bias_ptr, lengths_ptr, cu_seqlens_ptr,
    stride_kb, stride_kt, stride_kh, stride_pt, stride_ph, first_head, T, H, grad_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a query tile: dS K, and dR pos with dR[i, T-1-i+j] = dS[i, j]; the column sums of the two are du and dv_bias."""
    M: tl.constexpr = BLOCK_M
    N: tl.constexpr = BLOCK_N
    tiles = tl.cdiv(T, M)
    i0 = tl.program_id(0) % tiles * M
    slot = tl.program_id(0) // tiles
    bh = first_head + slot
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    i = tl.arange(0, M)
    n = tl.arange(0, N)
    d = tl.arange(0, BLOCK_D)
    pitch = _padded(T)
    ds_base = ds_ptr + slot.to(tl.int64) * pitch * pitch
    k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
    pos_base = pos_ptr + h.to(tl.int64) * stride_ph
    keys = tl.where(i0 < queries, keys, 0)
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    for j0 in range(0, keys, N):
        ds = _load_tile(ds_base + j0, i0, queries, pitch, N, M, N)
        k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
        acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    du = tl.sum(acc, 0)

    row = ds_base + (tl.cast(i0, tl.int64) + i)[:, None] * pitch
    # the first position that any of these queries meets is that of the last query and key 0
    for c0 in range(0, tl.where(keys > 0, keys + M - 1, 0), N):
        j = c0 - (M - 1) + i[:, None] + n[None, :]
        mask = (j.to(tl.uint32, bitcast=True) < keys.to(tl.uint32)) & _inside(i0, queries, M)[:, None]
        dr = tl.load(row + j, mask=mask, other=0.0)
        p = _load_tile(pos_base, T - M - i0 + c0, 2 * T - 1, stride_pt, D, N, BLOCK_D)
        acc = tl.dot(dr, p, acc, input_precision=PRECISION)
    grad_scale = tl.cast(grad_scale, tl.float32)
    _store_tile(dq_ptr + (first * H + h) * D, i0, queries, H * D, acc * grad_scale, D, M, BLOCK_D)
    # du_ptr, dv_bias_ptr: [B, tiles, H, D]
    place = ((tl.cast(b, tl.int64) * tiles + tl.program_id(0) % tiles) * H + h) * D + d
    tl.store(du_ptr + place, du * grad_scale, mask=d < D)
    tl.store(dv_bias_ptr + place, (tl.sum(acc, 0) - du) * grad_scale, mask=d < D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_key(
    weights_ptr, ds_ptr, qu_ptr, dout_ptr, dk_ptr, dv_ptr, lengths_ptr, cu_seqlens_ptr,
    stride_ob, stride_ot, stride_oh, first_head, T, H, grad_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = dS' (q + u) and dv = W' dout of a key tile."""
    M: tl.constexpr = BLOCK_M
    N: tl.constexpr = BLOCK_N
    tiles = tl.cdiv(T, N)
    j0 = tl.program_id(0) % tiles * N
    slot = tl.program_id(0) // tiles
    bh = first_head + slot
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    pitch = _padded(T)
    weights_base = weights_ptr + slot.to(tl.int64) * pitch * pitch + j0
    ds_base = ds_ptr + slot.to(tl.int64) * pitch * pitch + j0
    qu_base = qu_ptr + slot.to(tl.int64) * pitch * D
    dout_base = _head(dout_ptr, b, start, h, stride_ob, stride_ot, stride_oh)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_D), tl.float32)
    for i0 in range(0, tl.where(j0 < keys, queries, 0), M):
        ds = _load_tile(ds_base, i0, queries, pitch, N, M, N)
        qu = _load_tile(qu_base, i0, queries, D, D, M, BLOCK_D)
        dk = tl.dot(tl.trans(ds), qu, dk, input_precision=PRECISION)
        weights = _load_tile(weights_base, i0, queries, pitch, N, M, N)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, M, BLOCK_D)
        dv = tl.dot(tl.trans(weights), dout, dv, input_precision=PRECISION)
    dk = dk * tl.cast(grad_scale, tl.float32)
    _store_tile(dk_ptr + (first * H + h) * D, j0, queries, H * D, dk, D, N, BLOCK_D)
    _store_tile(dv_ptr + (first * H + h) * D, j0, queries, H * D, dv, D, N, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_position(
    ds_ptr, qv_ptr, dpos_ptr, lengths_ptr, cu_seqlens_ptr, first_head, heads, T, H, grad_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpos = dR' (q + v_bias) of N positions and one head, over a part of the scratch; adds to dpos_ptr.

    grad_scale: 1/sqrt(D) for the last heads, which scale the whole sum, else 1.
    """
    M: tl.constexpr = BLOCK_M
    N: tl.constexpr = BLOCK_N
    c0 = tl.program_id(0) * N
    h = tl.program_id(1)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    i = tl.arange(0, M)
    c = tl.arange(0, N)
    pitch = _padded(T)
    # dpos_ptr: [parts, 2T-1, H, D]; the first heads find nothing there
    dpos_base = dpos_ptr + (part.to(tl.int64) * (2 * T - 1) * H + h) * D
    acc = _load_tile(dpos_base, c0, tl.where(first_head > 0, 2 * T - 1, 0), H * D, D, N, BLOCK_D)
    own = (h + H - first_head % H) % H  # the first slot with this head
    for slot in range(own + part * H, heads, parts * H):
        _, _, queries, keys = _sequence((first_head + slot) // H, T, lengths_ptr, cu_seqlens_ptr)
        qv_base = qv_ptr + tl.cast(slot, tl.int64) * pitch * D
        # position c of query i is key i - (T-1) + c
        key = c0 - (T - 1) + i[:, None] + c[None, :]
        address = ds_ptr + tl.cast(slot, tl.int64) * pitch * pitch + i[:, None] * pitch + key
        for i0 in range(tl.maximum(0, T - c0 - N), tl.minimum(queries, keys + T - 1 - c0), M):
            mask = ((key + i0).to(tl.uint32, bitcast=True) < keys.to(tl.uint32)) & _inside(i0, queries, M)[:, None]
            dr = tl.load(address + tl.cast(i0, tl.int64) * (pitch + 1), mask=mask, other=0.0)
            qv = _load_tile(qv_base, i0, queries, D, D, M, BLOCK_D)
            acc = tl.dot(tl.trans(dr), qv, acc, input_precision=PRECISION)
    _store_tile(dpos_base, c0, 2 * T - 1, H * D, acc * tl.cast(grad_scale, tl.float32), D, N, BLOCK_D)


# bytes of scratch that a backward works through at a time: written and read again within the L2 of an H100 or H200 (50 MB)
SCRATCH = 32 << 20


def config_for(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    """Tiles and warps, chosen for their registers: `python -m lcconformer.kernels.report` shows what each costs."""
    if kernel == "draw":
        return LaunchConfig(4, 1, {"BLOCK_M": 64, "BLOCK_N": 128})
    blocks = {"BLOCK_D": max(16, next_power_of_2(head_dim))}
    wide = head_dim > 64
    # products of 64 rows are what sm_90 and sm_100 have instructions for; elsewhere wide heads take half the tile
    half = dtype == torch.float32 or (wide and nearest_arch(arch) not in (90, 100))
    # products of few rows are spread over all warps, so more of them hold less each: with four, the forward at D = 128
    # spills 568 B on sm_80
    warps = 8 if head_dim > 32 and half else 4
    if kernel in ("forward", "backward_scores"):
        return LaunchConfig(warps, 2, blocks | {"BLOCK_N": 16 if half else 32})
    # products of the scratch: the accumulators have BLOCK_M (query) or BLOCK_N (key, position) rows
    if kernel == "backward_query":
        return LaunchConfig(warps, 2, blocks | {"BLOCK_M": 64, "BLOCK_N": 32})
    # in float32, 32 queries by 64 positions spill 384 B on sm_80 at D = 128
    narrow = kernel == "backward_position" and dtype == torch.float32
    return LaunchConfig(warps, 2, blocks | {"BLOCK_M": 16 if narrow else 32, "BLOCK_N": 32 if narrow else 64})


# what may be tuned: products take columns by sixteen, a dropout word holds 32, the scratch has room for tiles of 64
_LIMITS = {
    "forward": {"BLOCK_N": (16, 32)},
    "backward_scores": {"BLOCK_N": (16, 32)},
    "backward_query": {"BLOCK_M": (32, 64), "BLOCK_N": (16, 64)},
    "backward_key": {"BLOCK_M": (16, 64), "BLOCK_N": (32, 64)},
    "backward_position": {"BLOCK_M": (16, 64), "BLOCK_N": (32, 64)},
}


def _config(kernel: str, q: Tensor) -> LaunchConfig:
    heuristic = config_for(kernel, arch_of(q), q.dtype, q.shape[-1])
    return tuned(f"relpos_attention.{kernel}", q, heuristic, _LIMITS[kernel])


def _padded_frames(t: int) -> int:
    return cdiv(t, 64) * 64


def _lengths_args(lengths: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Tensor | None]:
    return {
        "lengths_ptr": None if lengths is None else lengths.contiguous(),
        "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
    }


def _strides(name: str, x: Tensor) -> dict[str, int]:
    strides = x.stride()[:-1] if x.dim() == 4 else (0, *x.stride()[:-1])  # packed: no batch dimension
    return dict(zip((f"stride_{name}b", f"stride_{name}t", f"stride_{name}h"), strides))


def _sizes(q: Tensor, pos: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Return (utterances, frames of the longest, frames in all)."""
    frames = (pos.shape[0] + 1) // 2
    if cu_seqlens is None:
        return q.shape[0], frames, q.shape[0] * frames
    return cu_seqlens.numel() - 1, frames, q.shape[0]


def _dropout_words(
    seed: Tensor | None, p: float, b: int, t: int, h: int, ends: Mapping[str, Tensor | None]
) -> Tensor | None:
    """Dropout decisions of all scores, int32 [B, H, words, padded T]; None without a seed."""
    if seed is None:
        return None
    pitch = _padded_frames(t)
    keep = seed.new_empty(b, h, pitch // 32, pitch, dtype=torch.int32)
    config = config_for("draw", arch_of(seed), torch.int32, 0)
    tiles = cdiv(t, config.blocks["BLOCK_M"]) * cdiv(t, config.blocks["BLOCK_N"])
    launch(
        _draw, (b * h * tiles,), config, seed,
        seed_ptr=seed, keep_ptr=keep, **ends, T=t, H=h, threshold=dropout_threshold(p),
    )  # fmt: skip
    return keep


def _common_args(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor, u: Tensor, v_bias: Tensor, lse: Tensor, rows: int, t: int,
    p: float,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the two kernels that compute scores; the last dimension of q, k, v and pos has unit stride."""
    h, d = q.shape[-2:]
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "pos_ptr": pos, "u_ptr": u.contiguous(), "v_bias_ptr": v_bias.contiguous(),
        "lse_ptr": lse, **_strides("q", q), **_strides("k", k), **_strides("v", v), **_position_strides(pos),
        "T": t, "H": h, "rows": rows, "scale": math.log2(math.e) / math.sqrt(d), "keep_scale": dropout_scale(p),
        "D": d, "PRECISION": product_precision(q.dtype),
    }  # fmt: skip


def _position_strides(pos: Tensor) -> dict[str, int]:
    return {"stride_pt": pos.stride(0), "stride_ph": pos.stride(1)}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    u: Tensor,
    v_bias: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output, shaped like q, and the log2-sum-exp2 of the scaled scores in float32 [H, frames in all].

    q, k, v are [B, T, H, D], or packed [frames in all, H, D] with cu_seqlens [B+1]; `seed` is an int64 tensor of one
    element, or None for no dropout.  Shapes have been checked.  Writes to `out` and `lse`, contiguous, where given.
    """
    b, t, rows = _sizes(q, pos, cu_seqlens)
    h = q.shape[-2]
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(h, rows, dtype=torch.float32) if lse is None else lse
    q, k, v, pos = (unit_stride(x) for x in (q, k, v, pos))
    ends = _lengths_args(lengths, cu_seqlens)
    config = _config("forward", q)
    launch(
        _forward, (b * h * cdiv(t, 2 * config.blocks["BLOCK_N"]),), config, q,
        out_ptr=out, keep_ptr=_dropout_words(seed, dropout_p, b, t, h, ends), **ends,
        **_common_args(q, k, v, pos, u, v_bias, lse, rows, t, dropout_p),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    u: Tensor,
    v_bias: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    *,
    partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pos, u, v_bias, in their dtypes, from what `forward` returned.

    With `partial`, the last three are float32 partial sums [P, ...] to be added up over the first dimension.

    Scratch: two [padded T, padded T] matrices a head in the dtype of q, for the heads of `_heads_at_a_time`.
    """
    b, t, rows = _sizes(q, pos, cu_seqlens)
    h, d = q.shape[-2:]
    dout, q, k, v, pos = (unit_stride(x) for x in (dout, q, k, v, pos))
    ends = _lengths_args(lengths, cu_seqlens)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    names = ("backward_scores", "backward_query", "backward_key", "backward_position")
    of_scores, of_query, of_key, of_position = [_config(name, q) for name in names]
    row_tiles = cdiv(t, 2 * of_scores.blocks["BLOCK_N"])
    query_tiles = cdiv(t, of_query.blocks["BLOCK_M"])
    key_tiles = cdiv(t, of_key.blocks["BLOCK_N"])
    position_tiles = cdiv(2 * t - 1, of_position.blocks["BLOCK_N"])

    most = _heads_at_a_time(b * h, t, row_tiles, q.element_size())
    parts = _position_parts(cdiv(most, h), h, position_tiles)
    pitch = _padded_frames(t)
    weights, ds = (q.new_empty(most, pitch, pitch) for _ in range(2))
    qu, qv = (q.new_empty(most, pitch, d) for _ in range(2))
    du, dv_bias = (q.new_empty(b * query_tiles, h, d, dtype=torch.float32) for _ in range(2))
    dpos = q.new_empty(parts, 2 * t - 1, h, d, dtype=torch.float32)
    keep = _dropout_words(seed, dropout_p, b, t, h, ends)
    scores = _common_args(q, k, v, pos, u, v_bias, lse, rows, t, dropout_p)
    products = {**ends, "T": t, "H": h, "D": d, "PRECISION": scores["PRECISION"]}
    grad_scale = 1.0 / math.sqrt(d)
    for first in range(0, b * h, most):
        heads = min(most, b * h - first)
        launch(
            _backward_scores, (heads * row_tiles,), of_scores, q,
            out_ptr=out, dout_ptr=dout, **_strides("o", dout), keep_ptr=keep, **ends, **scores, first_head=first,
            weights_ptr=weights, ds_ptr=ds, qu_ptr=qu, qv_ptr=qv,
        )  # fmt: skip
        launch(
            _backward_query, (heads * query_tiles,), of_query, q,
            k_ptr=k, pos_ptr=pos, ds_ptr=ds, dq_ptr=dq, du_ptr=du, dv_bias_ptr=dv_bias, **_strides("k", k),
            **_position_strides(pos), first_head=first, grad_scale=grad_scale, **products,
        )  # fmt: skip
        launch(
            _backward_key, (heads * key_tiles,), of_key, q,
            weights_ptr=weights, ds_ptr=ds, qu_ptr=qu, dout_ptr=dout, dk_ptr=dk, dv_ptr=dv, **_strides("o", dout),
            first_head=first, grad_scale=grad_scale, **products,
        )  # fmt: skip
        launch(
            _backward_position, (position_tiles, h, parts), of_position, q,
            ds_ptr=ds, qv_ptr=qv, dpos_ptr=dpos, first_head=first, heads=heads,
            grad_scale=grad_scale if first + heads == b * h else 1.0, **products,
        )  # fmt: skip
    if partial:
        return dq, dk, dv, dpos, du, dv_bias
    # sums over the partial results: a fixed order, hence the same bits every time
    return dq, dk, dv, dpos.sum(0).to(pos.dtype), du.sum(0).to(u.dtype), dv_bias.sum(0).to(v_bias.dtype)


def _heads_at_a_time(heads: int, t: int, row_tiles: int, element_size: int) -> int:
    """Return how many heads share the scratch: those that fit `SCRATCH`, or fill 132 multiprocessors twice if more do."""
    fit = SCRATCH // (2 * _padded_frames(t) ** 2 * element_size)
    most = max(fit, cdiv(2 * 132, row_tiles))
    return cdiv(heads, cdiv(heads, most))


def _position_parts(utterances: int, heads: int, tiles: int) -> int:
    """Return how many parts to split the utterances in: about four blocks for each of 132 multiprocessors."""
    return max(1, min(utterances, cdiv(4 * 132, heads * tiles)))


_KERNELS = {
    "draw": _draw,
    "forward": _forward,
    "backward_scores": _backward_scores,
    "backward_query": _backward_query,
    "backward_key": _backward_key,
    "backward_position": _backward_position,
}
_FLOAT32 = ("lse_ptr", "du_ptr", "dpos_ptr", "dv_bias_ptr")  # whatever the inputs are


def _aot_config(
    name: str, arch: int, dtype: str, head_dim: int, dropout: bool = False, packed: bool = False
) -> AotConfig:
    kernel = _KERNELS[name]
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    config = config_for(name, arch, torch_dtype, head_dim)
    absent = {"lengths_ptr"} if packed else {"cu_seqlens_ptr"}
    absent |= set() if dropout else {"keep_ptr"}
    values = {"D": head_dim, "PRECISION": product_precision(torch_dtype), **config.blocks, **dict.fromkeys(absent)}
    return aot_config(
        f"relpos_attention.{name} D={head_dim}{' dropout' if dropout else ''}{' packed' if packed else ''}",
        kernel,
        dtype,
        config,
        {n: value for n, value in values.items() if n in kernel.arg_names},
        types=dict.fromkeys(_FLOAT32, "*fp32") | {"keep_ptr": "*i32"},
        divisible=[n for n in kernel.arg_names if n.startswith("stride_")],
        tensor_cores=name != "draw" and dtype != "fp32",
        spill_budget=64,
    )


def aot_configs(arch: int) -> Iterable[AotConfig]:
    """Yield every shipped configuration for compute capability `arch`."""
    yield _aot_config("draw", arch, "bf16", 64, dropout=True)
    for name in _KERNELS:
        if name == "draw":
            continue
        for dtype in ("bf16", "fp32"):
            for head_dim in (16, 32, 64, 128):
                yield _aot_config(name, arch, dtype, head_dim)
        yield _aot_config(name, arch, "fp16", 64)
        if "keep_ptr" in _KERNELS[name].arg_names:
            yield _aot_config(name, arch, "bf16", 64, dropout=True)
        yield _aot_config(name, arch, "bf16", 64, packed=True)
