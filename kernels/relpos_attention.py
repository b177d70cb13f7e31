"""Transformer-XL relative attention as a flash kernel, forward and backward; no score ever reaches global memory.

S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos[T-1-i+j]) / sqrt(D).  The second term needs, for a tile of M queries
from i0 and N keys from j0, a parallelogram of products (i, position), not a rectangle.

The shift is a rotation.  Let R_t[i, c] = (q_i + v_bias) . pos[T-i0+j0 + c], c < N, a dense product for the key tile t at
j0.  Element (i, j) of the tile (indices local to it) is in column j-i-1 of R_t, or, where that is negative, in column
j-i-1+N of R_{t-1}, or j-i-1+2N of R_{t-2}: always column (j-i-1) mod N.  So the rows of each R are rotated once, and the
result serves this tile and the next M/N: walking along the keys costs one product and one rotation a tile, no more
MMA work than the content term.  The inverse rotation carries dS back to the coordinates of R.

What else was compiled (sm_90, bf16, D = 64, 4 warps; instructions in the loop are for 64 x 64 scores; not timed):

  forward                                            registers  spilled  shared KiB  instructions
  no positions at all                                      120     0 B          40           436
  rotation, 64 x 32 tiles (this file)                      183     0 B          40           782
  rotation, 64 x 64 tiles                                  255   0-88 B         72           765
  rotation, 64 x 64, R rounded to fp16 for it              255     0 B          60           840
  rotation, 64 x 128 tiles                                 255  1168 B         144             -
  gather through shared memory by flat index               255    40 B          72           740, with bank conflicts
  the whole band again for every tile (64 x 128, gather)   255   136 B         112          1215
  scores from a scratch in global memory (pitch 2T-2)      122     0 B          48           580, and a GEMM; 4 T^2 bytes
                                                                                  written and 2 T^2 read a head

The narrow tile costs 2% more instructions than the square one and leaves room for two blocks on a multiprocessor
with registers to spare, for dropout (221 registers) and for D = 128 (255, 8 B).  The scratch has the shortest loop, but is
the traffic that a flash kernel is there to avoid.

Backward, three kernels, none of which writes to another's rows: no atomics, and the same bits every time.
  _backward_query     one program per query tile, walks the keys:          dq
  _backward_key       one program per key tile, walks the queries:         dk, dv, partial du
  _backward_position  one program per N rows of pos, walks the diagonal:   partial dpos, partial dv_bias
du is the sum of dS[i, j] k_j: a key tile has the column sums of dS, so du needs no pass of its own; dv_bias likewise from
the column sums in the coordinates of R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    AotConfig,
    LaunchConfig,
    arch_of,
    cdiv,
    constexpr_signature,
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    launch,
    nearest_arch,
    next_power_of_2,
    unit_stride,
)
from .tuning import tuned

__all__ = ["aot_configs", "backward", "config_for", "forward"]

# what changes with T or B: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("B", "T", "rows", "threshold")


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
def _load_tile(base, row, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows row ... row+BLOCK-1 of a matrix with `rows` rows, zeros outside: [BLOCK, BLOCK_D]."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = _inside(row, rows, BLOCK)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    # the tile's offset in 64 bits, those inside the tile in 32
    return tl.load(base + tl.cast(row, tl.int64) * stride + i[:, None] * stride + d[None, :], mask=mask, other=0.0)


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
def _rotated_scores(
    qv, pos_base, row, T, stride, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R for the positions row ... row+N-1, its rows rotated: [M, N] with R[i, (j-i-1) mod N] at (i, j)."""
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    p = _load_tile(pos_base, row, 2 * T - 1, stride, D, N, BLOCK_D)
    return tl.gather(tl.dot(qv, tl.trans(p), input_precision=PRECISION), (j - i - 1) & (N - 1), 1)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, out_ptr, lse_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_pt, stride_ph,
    T, H, rows, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = 2 * BLOCK_N
    N: tl.constexpr = BLOCK_N
    i0 = tl.program_id(0) * M
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        i = tl.arange(0, M)
        j = tl.arange(0, N)
        age = (i[:, None] - j[None, :] + N) // N  # [M, N], which of R_t, R_{t-1}, R_{t-2}
        scale = tl.cast(scale, tl.float32)
        k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
        v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
        q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)

        latest = _rotated_scores(qv, pos_base, T - i0 - N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        older = _rotated_scores(qv, pos_base, T - i0 - 2 * N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        older = tl.where(age == 2, older, latest)
        m = tl.full((M,), float("-inf"), tl.float32)
        denominator = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, BLOCK_D), tl.float32)
        for j0 in range(0, keys, N):
            r = _rotated_scores(qv, pos_base, T - i0 + j0, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
            s = tl.where(age == 0, r, older)
            older = tl.where(age == 2, latest, r)
            latest = r
            k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
            s = tl.dot(qu, tl.trans(k), s, input_precision=PRECISION)
            s = tl.where(_inside(j0, keys, N)[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            w = tl.math.exp2(s * scale - m_new[:, None])
            alpha = tl.math.exp2(m - m_new)
            denominator = denominator * alpha + tl.sum(w, 1)
            m = m_new
            if seed_ptr is not None:
                w = tl.where(dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, N), w, 0.0)
            v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D)
            acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

        # no key, no weight: zeros
        some = denominator > 0
        denominator = tl.where(some, denominator, 1.0)
        norm = 1.0 / denominator
        if seed_ptr is not None:
            norm = norm * tl.cast(keep_scale, tl.float32)
        _store_tile(out_ptr + (first * H + h) * D, i0, queries, H * D, acc * norm[:, None], D, M, BLOCK_D)
        lse = tl.where(some, m, 0.0) + tl.math.log2(denominator)
        tl.store(lse_ptr + h.to(tl.int64) * rows + first + i0 + i, lse, mask=_inside(i0, queries, M))


@triton.jit(do_not_specialize=RUNTIME)
def _delta(
    out_ptr, dout_ptr, delta_ptr, stride_ob, stride_ot, stride_oh, T, H, rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[h, row] = sum over d of out * dout; row counts the frames of the whole batch."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    out = tl.load(out_ptr + (row * H + h)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    offset = (row // T) * stride_ob + (row % T) * stride_ot + h * stride_oh
    dout = tl.load(dout_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + h * rows + row, tl.sum(out * dout, 1), mask=row < rows)


@triton.jit
def _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, seed_ptr):
    """Attention weights after dropout, and dS up to the factor 1/sqrt(D)."""
    w = tl.where(valid, tl.math.exp2(s * scale - lse), 0.0)
    dropped = w
    if seed_ptr is not None:
        dropped = tl.where(keep, w * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dropped, w * (dp - delta)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_query(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = 2 * BLOCK_N
    N: tl.constexpr = BLOCK_N
    i0 = tl.program_id(0) * M
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        i = tl.arange(0, M)
        j = tl.arange(0, N)
        age = (i[:, None] - j[None, :] + N) // N  # [M, N], which of R_t, R_{t-1}, R_{t-2} a score is in
        back = (j[None, :] + i[:, None] + 1) // N  # [M, N], the same for a column of R
        column = (j[None, :] + i[:, None] + 1) & (N - 1)
        scale = tl.cast(scale, tl.float32)
        keep_scale = tl.cast(keep_scale, tl.float32)
        k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
        v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
        q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
        dout_base = _head(dout_ptr, b, start, h, stride_ob, stride_ot, stride_oh)
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, M, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
        lse = _load_rows(lse_ptr + h.to(tl.int64) * rows + first, i0, queries, float("inf"), M)
        delta = _load_rows(delta_ptr + h.to(tl.int64) * rows + first, i0, queries, 0.0, M)

        latest = _rotated_scores(qv, pos_base, T - i0 - N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        older = _rotated_scores(qv, pos_base, T - i0 - 2 * N, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
        older = tl.where(age == 2, older, latest)
        dr_older = tl.zeros((M, N), q.dtype)  # dR_{t-2}, the columns known so far
        dr_latest = tl.zeros((M, N), q.dtype)  # dR_{t-1}
        acc = tl.zeros((M, BLOCK_D), tl.float32)
        for j0 in range(0, keys, N):
            r = _rotated_scores(qv, pos_base, T - i0 + j0, T, stride_pt, D, M, N, BLOCK_D, PRECISION)
            s = tl.where(age == 0, r, older)
            older = tl.where(age == 2, latest, r)
            latest = r
            k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
            s = tl.dot(qu, tl.trans(k), s, input_precision=PRECISION)
            v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            keep = age == 0
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, N)
            valid = _inside(j0, keys, N)[None, :]
            _, ds = _weights_and_ds(s, dp, lse[:, None], delta[:, None], valid, keep, scale, keep_scale, seed_ptr)
            ds = ds.to(q.dtype)
            acc = tl.dot(ds, k, acc, input_precision=PRECISION)
            dr = tl.gather(ds, column, 1)
            p = _load_tile(pos_base, T - i0 + j0 - 2 * N, 2 * T - 1, stride_pt, D, N, BLOCK_D)
            acc = tl.dot(tl.where(back == 2, dr, dr_older), p, acc, input_precision=PRECISION)
            dr_older = tl.where(back == 0, dr_latest, dr)
            dr_latest = dr
        end = T - i0 + (keys + N - 1) // N * N
        p = _load_tile(pos_base, end - 2 * N, 2 * T - 1, stride_pt, D, N, BLOCK_D)
        acc = tl.dot(tl.where(back == 2, 0.0, dr_older).to(q.dtype), p, acc, input_precision=PRECISION)
        p = _load_tile(pos_base, end - N, 2 * T - 1, stride_pt, D, N, BLOCK_D)
        acc = tl.dot(tl.where(back == 0, dr_latest, 0.0).to(q.dtype), p, acc, input_precision=PRECISION)
        acc = acc * tl.cast(grad_scale, tl.float32)
        _store_tile(dq_ptr + (first * H + h) * D, i0, queries, H * D, acc, D, M, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_key(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, du_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed, [N, M] with keys or positions down and queries across, and M <= N.

    Other queries, other rows of R: nothing carries over from tile to tile, so R_t and R_{t-1} are both computed.
    """
    M: tl.constexpr = BLOCK_M
    N: tl.constexpr = BLOCK_N
    j0 = tl.program_id(0) * N
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    d = tl.arange(0, BLOCK_D)
    in_latest = j[:, None] + i[None, :] + 1 < N  # [N, M], columns of R_t, the others of R_{t-1}
    rotation = (j[:, None] - i[None, :] - 1) & (N - 1)
    scale = tl.cast(scale, tl.float32)
    keep_scale = tl.cast(keep_scale, tl.float32)
    grad_scale = tl.cast(grad_scale, tl.float32)
    k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
    v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
    q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
    dout_base = _head(dout_ptr, b, start, h, stride_ob, stride_ot, stride_oh)
    pos_base = pos_ptr + h.to(tl.int64) * stride_ph
    lse_base = lse_ptr + h.to(tl.int64) * rows + first
    delta_base = delta_ptr + h.to(tl.int64) * rows + first
    k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
    v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D)
    valid = _inside(j0, keys, N)[:, None]

    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_D), tl.float32)
    total = tl.zeros((N,), tl.float32)  # sum over the queries of dS
    for i0 in range(0, tl.where(j0 < keys, queries, 0), M):
        q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
        qv = tl.trans(_add_bias(q, v_bias_ptr, h, D, BLOCK_D))
        p = _load_tile(pos_base, T - i0 + j0, 2 * T - 1, stride_pt, D, N, BLOCK_D)
        r = tl.dot(p, qv, input_precision=PRECISION)
        p = _load_tile(pos_base, T - i0 + j0 - N, 2 * T - 1, stride_pt, D, N, BLOCK_D)
        r = tl.where(in_latest, r, tl.dot(p, qv, input_precision=PRECISION))
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        s = tl.dot(k, tl.trans(qu), tl.gather(r, rotation, 0), input_precision=PRECISION)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, M, BLOCK_D)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        lse = _load_rows(lse_base, i0, queries, float("inf"), M)[None, :]
        delta = _load_rows(delta_base, i0, queries, 0.0, M)[None, :]
        keep = in_latest
        if seed_ptr is not None:
            keep = tl.trans(dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, N))
        w, ds = _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, seed_ptr)
        dv = tl.dot(w.to(q.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), qu, dk, input_precision=PRECISION)
        total += tl.sum(ds, 1)

    _store_tile(dk_ptr + (first * H + h) * D, j0, queries, H * D, dk * grad_scale, D, N, BLOCK_D)
    _store_tile(dv_ptr + (first * H + h) * D, j0, queries, H * D, dv, D, N, BLOCK_D)
    # read again: keeping it would cost registers all along the loop
    k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
    du = tl.sum(total[:, None] * k.to(tl.float32), 0) * grad_scale
    # du_ptr: [B, tiles, H, D]
    tile = b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(du_ptr + (tile * H + h) * D + d, du, mask=d < D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_position(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dpos_ptr, dv_bias_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    B, T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows T + diagonal ... of dpos, over a part of the batch; tiles as in _backward_key.

    The queries from i0 meet these N positions in two key tiles, those at i0 + diagonal and at i0 + diagonal + N, each
    in one corner.  The corners make up one tile: into it the rotated R fits as it is, and its dS back into dR.
    """
    M: tl.constexpr = BLOCK_M
    N: tl.constexpr = BLOCK_N
    diagonal = (tl.program_id(0) - tl.num_programs(0) // 2) * N
    h = tl.program_id(1)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    d = tl.arange(0, BLOCK_D)
    near = j[:, None] > i[None, :]  # [N, M], the corner of the first key tile
    rotation = (j[:, None] - i[None, :] - 1) & (N - 1)
    rotation_back = (j[:, None] + i[None, :] + 1) & (N - 1)
    scale = tl.cast(scale, tl.float32)
    keep_scale = tl.cast(keep_scale, tl.float32)
    grad_scale = tl.cast(grad_scale, tl.float32)
    pos_base = pos_ptr + h.to(tl.int64) * stride_ph
    p = _load_tile(pos_base, T + diagonal, 2 * T - 1, stride_pt, D, N, BLOCK_D)

    dpos = tl.zeros((N, BLOCK_D), tl.float32)
    total = tl.zeros((N,), tl.float32)  # sum over batch and queries of dR
    for b in range(B * part // parts, B * (part + 1) // parts):
        start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
        k_base = _head(k_ptr, b, start, h, stride_kb, stride_kt, stride_kh)
        v_base = _head(v_ptr, b, start, h, stride_vb, stride_vt, stride_vh)
        q_base = _head(q_ptr, b, start, h, stride_qb, stride_qt, stride_qh)
        dout_base = _head(dout_ptr, b, start, h, stride_ob, stride_ot, stride_oh)
        lse_base = lse_ptr + h.to(tl.int64) * rows + first
        delta_base = delta_ptr + h.to(tl.int64) * rows + first
        for i0 in range(tl.maximum(0, -diagonal - N), tl.minimum(queries, keys - diagonal), M):
            j0 = i0 + diagonal
            q = _load_tile(q_base, i0, queries, stride_qt, D, M, BLOCK_D)
            qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
            qu = tl.trans(_add_bias(q, u_ptr, h, D, BLOCK_D))
            k = _load_tile(k_base, j0, keys, stride_kt, D, N, BLOCK_D)
            s = tl.dot(k, qu, input_precision=PRECISION)
            k = _load_tile(k_base, j0 + N, keys, stride_kt, D, N, BLOCK_D)
            s = tl.where(near, s, tl.dot(k, qu, input_precision=PRECISION))
            r = tl.dot(p, tl.trans(qv), input_precision=PRECISION)
            s += tl.gather(r, rotation, 0)
            dout = tl.trans(_load_tile(dout_base, i0, queries, stride_ot, D, M, BLOCK_D))
            v = _load_tile(v_base, j0, keys, stride_vt, D, N, BLOCK_D)
            dp = tl.dot(v, dout, input_precision=PRECISION)
            v = _load_tile(v_base, j0 + N, keys, stride_vt, D, N, BLOCK_D)
            dp = tl.where(near, dp, tl.dot(v, dout, input_precision=PRECISION))
            lse = _load_rows(lse_base, i0, queries, float("inf"), M)[None, :]
            delta = _load_rows(delta_base, i0, queries, 0.0, M)[None, :]
            keep = near
            if seed_ptr is not None:
                seed = tl.load(seed_ptr)
                keep = tl.trans(dropout_keep(seed, 0, b * H + h, i0 + i, j0, threshold, N))
                keep_far = tl.trans(dropout_keep(seed, 0, b * H + h, i0 + i, j0 + N, threshold, N))
                keep = (near & keep) | ((j[:, None] <= i[None, :]) & keep_far)
            valid = tl.where(near, _inside(j0, keys, N)[:, None], _inside(j0 + N, keys, N)[:, None])
            _, ds = _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, seed_ptr)
            dr = tl.gather(ds, rotation_back, 0)
            dpos = tl.dot(dr.to(q.dtype), qv, dpos, input_precision=PRECISION)
            total += tl.sum(dr, 1)

    # dpos_ptr: [parts, 2T-1, H, D]
    out = dpos_ptr + (part.to(tl.int64) * (2 * T - 1) * H + h) * D
    _store_tile(out, T + diagonal, 2 * T - 1, H * D, dpos * grad_scale, D, N, BLOCK_D)
    p = _load_tile(pos_base, T + diagonal, 2 * T - 1, stride_pt, D, N, BLOCK_D)
    dv_bias = tl.sum(total[:, None] * p.to(tl.float32), 0) * grad_scale
    # dv_bias_ptr: [parts, 2 tiles, H, D]
    tile = part * tl.num_programs(0) + tl.program_id(0)
    tl.store(dv_bias_ptr + (tile * H + h) * D + d, dv_bias, mask=d < D)


def config_for(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    """Tiles and warps, chosen for their registers: `python -m lcconformer.kernels.report` shows what each costs."""
    blocks = {"BLOCK_D": max(16, next_power_of_2(head_dim))}
    if kernel == "delta":
        return LaunchConfig(4, 1, blocks | {"BLOCK_M": 64})
    wide = head_dim > 64
    # products of 64 rows are what sm_90 and sm_100 have instructions for; elsewhere wide heads take half the tile
    half = dtype == torch.float32 or (wide and nearest_arch(arch) not in (90, 100))
    # products of few rows are spread over all warps, so more of them hold less each: with four, the forward at D = 128
    # spills 568 B on sm_80
    warps = 8 if head_dim > 32 and half else 4
    if kernel in ("forward", "backward_query"):
        return LaunchConfig(warps, 2, blocks | {"BLOCK_N": 16 if half else 32})
    # accumulators are as large as the keys or positions of a tile, whatever its number of queries
    tile = {"BLOCK_M": 16 if dtype == torch.float32 else 32, "BLOCK_N": 32 if half else 64}
    # loads ahead of their use take registers too; on sm_100 the position kernel then spills 448 B at D = 64
    ahead = not (wide or half or (kernel == "backward_position" and nearest_arch(arch) == 100))
    return LaunchConfig(warps, 2 if ahead else 1, blocks | tile)


# what may be tuned: dropout takes columns by eight, products sixteen; a tile has no more queries than keys
_LIMITS = {
    "forward": {"BLOCK_N": (16, 64)},
    "backward_query": {"BLOCK_N": (16, 64)},
    "backward_key": {"BLOCK_M": (16, 32), "BLOCK_N": (32, 128)},
    "backward_position": {"BLOCK_M": (16, 32), "BLOCK_N": (32, 128)},
}


def _config(kernel: str, q: Tensor) -> LaunchConfig:
    heuristic = config_for(kernel, arch_of(q), q.dtype, q.shape[-1])
    return tuned(f"relpos_attention.{kernel}", q, heuristic, _LIMITS[kernel])


def _precision(dtype: torch.dtype) -> str:
    """float32 products as PyTorch's own matmuls do them: exact, or TF32 where that is allowed."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _dropout_args(seed: Tensor | None, p: float) -> dict[str, Any]:
    return {
        "seed_ptr": seed,
        "threshold": dropout_threshold(p),
        "keep_scale": dropout_scale(p),
    }


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
) -> tuple[Tensor, Tensor]:
    """Output, shaped like q, and the log2-sum-exp2 of the scaled scores in float32 [H, frames in all].

    q, k, v are [B, T, H, D], or packed [frames in all, H, D] with cu_seqlens [B+1]; `seed` is an int64 tensor of one
    element, or None for no dropout.  Shapes have been checked.  Writes to `out`, contiguous, where given.
    """
    b, t, rows = _sizes(q, pos, cu_seqlens)
    h, d = q.shape[-2:]
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(h, rows, dtype=torch.float32)
    q, k, v, pos = (unit_stride(x) for x in (q, k, v, pos))
    config = _config("forward", q)
    launch(
        _forward,
        (cdiv(t, 2 * config.blocks["BLOCK_N"]), b * h),
        config,
        q,
        q_ptr=q, k_ptr=k, v_ptr=v, pos_ptr=pos, u_ptr=u.contiguous(), v_bias_ptr=v_bias.contiguous(),
        out_ptr=out, lse_ptr=lse, **_lengths_args(lengths, cu_seqlens),
        **_strides("q", q), **_strides("k", k), **_strides("v", v), stride_pt=pos.stride(0), stride_ph=pos.stride(1),
        T=t, H=h, rows=rows, scale=math.log2(math.e) / math.sqrt(d), D=d, PRECISION=_precision(q.dtype),
        **_dropout_args(seed, dropout_p),
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
    """
    b, t, rows = _sizes(q, pos, cu_seqlens)
    h, d = q.shape[-2:]
    dout, q, k, v, pos = (unit_stride(x) for x in (dout, q, k, v, pos))
    delta = torch.empty_like(lse)
    delta_config = config_for("delta", arch_of(q), q.dtype, d)
    launch(
        _delta, (cdiv(rows, delta_config.blocks["BLOCK_M"]), h), delta_config, q,
        out_ptr=out, dout_ptr=dout, delta_ptr=delta, **_strides("o", dout), H=h, rows=rows, D=d,
        T=t if cu_seqlens is None else rows,
    )  # fmt: skip
    common = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "pos_ptr": pos, "u_ptr": u.contiguous(), "v_bias_ptr": v_bias.contiguous(),
        "dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta, **_lengths_args(lengths, cu_seqlens),
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("o", dout),
        "stride_pt": pos.stride(0), "stride_ph": pos.stride(1), "T": t, "H": h, "rows": rows,
        "scale": math.log2(math.e) / math.sqrt(d), "grad_scale": 1.0 / math.sqrt(d),
        "D": d, "PRECISION": _precision(q.dtype), **_dropout_args(seed, dropout_p),
    }  # fmt: skip

    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    config = _config("backward_query", q)
    launch(_backward_query, (cdiv(t, 2 * config.blocks["BLOCK_N"]), b * h), config, q, dq_ptr=dq, **common)

    config = _config("backward_key", q)
    tiles = cdiv(t, config.blocks["BLOCK_N"])
    du = q.new_empty(b * tiles, h, d, dtype=torch.float32)
    launch(_backward_key, (tiles, b * h), config, q, dk_ptr=dk, dv_ptr=dv, du_ptr=du, **common)

    config = _config("backward_position", q)
    tiles = 2 * cdiv(t, config.blocks["BLOCK_N"])
    parts = _position_parts(b, h, tiles)
    dpos = q.new_empty(parts, 2 * t - 1, h, d, dtype=torch.float32)
    dv_bias = q.new_empty(parts * tiles, h, d, dtype=torch.float32)
    launch(_backward_position, (tiles, h, parts), config, q, dpos_ptr=dpos, dv_bias_ptr=dv_bias, B=b, **common)
    if partial:
        return dq, dk, dv, dpos, du, dv_bias
    # sums over the partial results: a fixed order, hence the same bits every time
    return dq, dk, dv, dpos.sum(0).to(pos.dtype), du.sum(0).to(u.dtype), dv_bias.sum(0).to(v_bias.dtype)


def _position_parts(batch: int, heads: int, tiles: int) -> int:
    """Return how many parts to split the batch into: about four blocks for each of 132 multiprocessors."""
    return max(1, min(batch, cdiv(4 * 132, heads * tiles)))


_KERNELS = {
    "forward": _forward,
    "delta": _delta,
    "backward_query": _backward_query,
    "backward_key": _backward_key,
    "backward_position": _backward_position,
}
_POINTERS = {"lse_ptr", "delta_ptr", "du_ptr", "dpos_ptr", "dv_bias_ptr"}  # float32 whatever the inputs are


def _spill_budget(name: str) -> int:
    """Return the spill budget in bytes per thread: small in the forward; the backward does not fit in registers."""
    return 64 if name in ("forward", "delta") else 640


def _aot_config(
    name: str, arch: int, dtype: str, head_dim: int, dropout: bool = False, packed: bool = False
) -> AotConfig:
    kernel = _KERNELS[name]
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    config = config_for(name, arch, torch_dtype, head_dim)
    absent = {"lengths_ptr"} if packed else {"cu_seqlens_ptr"}
    absent |= set() if dropout else {"seed_ptr"}
    constexprs = {"D": head_dim, "PRECISION": _precision(torch_dtype), **config.blocks, **dict.fromkeys(absent)}
    pointers = {n: "*fp32" if n in _POINTERS else f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")}
    pointers |= dict.fromkeys(("lengths_ptr", "cu_seqlens_ptr", "seed_ptr"), "*i64")
    scalars = {
        n: "i32" for n in kernel.arg_names if n.startswith("stride_") or n in ("B", "T", "H", "rows", "threshold")
    }
    scalars |= dict.fromkeys(("scale", "grad_scale", "keep_scale"), "fp32")
    constexprs = {n: c for n, c in constexprs.items() if n in kernel.arg_names}
    return AotConfig(
        name=f"relpos_attention.{name} D={head_dim}{' dropout' if dropout else ''}{' packed' if packed else ''}",
        kernel=kernel,
        signature=constexpr_signature(kernel, pointers, scalars, constexprs),
        constexprs=constexprs,
        dtype=dtype,
        launch=config,
        divisible=frozenset(n for n in scalars if n.startswith("stride_")),
        tensor_cores=name != "delta" and dtype != "fp32",
        spill_budget=_spill_budget(name),
        may_serialize=name == "backward_query" or (name == "forward" and dropout),
    )


def aot_configs(arch: int) -> Iterable[AotConfig]:
    """Yield every shipped configuration for compute capability `arch`."""
    for name in _KERNELS:
        for dtype in ("bf16", "fp32"):
            for head_dim in (16, 32, 64, 128):
                yield _aot_config(name, arch, dtype, head_dim)
        yield _aot_config(name, arch, "fp16", 64)
        if name != "delta":
            yield _aot_config(name, arch, "bf16", 64, dropout=True)
            yield _aot_config(name, arch, "bf16", 64, packed=True)
