"""Transformer-XL relative attention as a flash kernel, forward and backward; no score ever reaches global memory.

S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos[T-1-i+j]) / sqrt(D).  The second term needs, for a tile of queries
i0 ... and keys j0 ..., the band of positions T-1-i+j: a parallelogram, not a rectangle.

The shift is a rotation.  With square tiles of BLOCK = N, let R[i, c] = (q_i + v_bias) . pos[T-i0+j0 + c], c < N, one
dense product.  Element (i, j) of the tile (indices local to it) needs column j-i-1 of this R where j > i, and column
j-i-1+N of the R of the previous key tile where j <= i: in both cases column (j-i-1) mod N.  So one rotation of the rows
of R serves two tiles: its upper triangle the present one, its lower triangle the next, and walking along the keys costs
one N x N product and one N x N rotation a tile, no more MMA work than the content term.  The inverse rotation carries
dS back to the coordinates of R.

Backward, three kernels, none of which writes to another's rows, so no atomics and the same bits every time:
  _backward_query     one program per query tile, walks the keys:          dq
  _backward_key       one program per key tile, walks the queries:         dk, dv, partial du
  _backward_position  one program per N rows of pos, walks the diagonal:   partial dpos, partial dv_bias
The sum over j of dS[i, j] k_j, over i, is du: key tiles hold the column sums, so du needs no pass of its own; dv_bias
likewise from the column sums in the coordinates of R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
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

__all__ = ["aot_configs", "backward", "config_for", "forward"]


@triton.jit
def _rotate(x, BLOCK: tl.constexpr):
    """x[i, (j - i - 1) mod BLOCK]"""
    i = tl.arange(0, BLOCK)
    return tl.gather(x, (i[None, :] - i[:, None] - 1) & (BLOCK - 1), 1)


@triton.jit
def _rotate_back(x, BLOCK: tl.constexpr):
    """x[i, (c + i + 1) mod BLOCK], the inverse of _rotate"""
    i = tl.arange(0, BLOCK)
    return tl.gather(x, (i[None, :] + i[:, None] + 1) & (BLOCK - 1), 1)


@triton.jit
def _sequence(b, T, lengths_ptr, cu_seqlens_ptr):
    """Of utterance b: first row within its batch entry, first row of all, number of queries, number of keys."""
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
def _load_tile(base, row, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows row ... row+BLOCK-1 of a matrix with `rows` rows, zeros outside: [BLOCK, BLOCK_D]."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = ((row + i >= 0) & (row + i < rows))[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    # the scalar in 64 bits, the offsets inside the tile in 32
    return tl.load(base + tl.cast(row, tl.int64) * stride + i[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(base, row, rows, stride, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = ((row + i >= 0) & (row + i < rows))[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(base + tl.cast(row, tl.int64) * stride + i[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _add_bias(x, bias_ptr, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x + bias[h], rounded to the dtype of x as the reference does: [BLOCK, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + h * D + d, mask=d < D, other=0.0)
    return (x.to(tl.float32) + bias.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, out_ptr, lse_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_pt, stride_ph,
    T, H, rows, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BLOCK
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        i = tl.arange(0, BLOCK)
        upper = i[None, :] > i[:, None]
        scale = tl.cast(scale, tl.float32)
        k_base = k_ptr + b.to(tl.int64) * stride_kb + start * stride_kt + h.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + start * stride_vt + h.to(tl.int64) * stride_vh
        q_base = q_ptr + b.to(tl.int64) * stride_qb + start * stride_qt + h.to(tl.int64) * stride_qh
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        q = _load_tile(q_base, i0, queries, stride_qt, D, BLOCK, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)

        p = _load_tile(pos_base, T - i0 - BLOCK, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
        previous = _rotate(tl.dot(qv, tl.trans(p), input_precision=PRECISION), BLOCK)
        m = tl.full((BLOCK,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK,), tl.float32)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for j0 in range(0, keys, BLOCK):
            p = _load_tile(pos_base, T - i0 + j0, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
            rotated = _rotate(tl.dot(qv, tl.trans(p), input_precision=PRECISION), BLOCK)
            k = _load_tile(k_base, j0, keys, stride_kt, D, BLOCK, BLOCK_D)
            s = tl.dot(qu, tl.trans(k), tl.where(upper, rotated, previous), input_precision=PRECISION)
            previous = rotated
            s = tl.where((j0 + i < keys)[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            w = tl.math.exp2(s * scale - m_new[:, None])
            alpha = tl.math.exp2(m - m_new)
            l = l * alpha + tl.sum(w, 1)
            m = m_new
            if DROPOUT:
                keep = dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, BLOCK)
                w = tl.where(keep, w, 0.0)
            v = _load_tile(v_base, j0, keys, stride_vt, D, BLOCK, BLOCK_D)
            acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

        norm = 1.0 / tl.where(l > 0, l, 1.0)
        if DROPOUT:
            norm = norm * tl.cast(keep_scale, tl.float32)
        _store_tile(out_ptr + (first * H + h) * D, i0, queries, H * D, acc * norm[:, None], D, BLOCK, BLOCK_D)
        lse = tl.where(l > 0, m + tl.math.log2(l), 0.0)
        tl.store(lse_ptr + h.to(tl.int64) * rows + first + i0 + i, lse, mask=i0 + i < queries)


@triton.jit
def _delta(
    out_ptr, dout_ptr, delta_ptr, stride_ob, stride_ot, stride_oh, T, H, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[h, row] = sum over d of out * dout; row counts the frames of the whole batch."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    out = tl.load(out_ptr + (row * H + h)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    offset = (row // T) * stride_ob + (row % T) * stride_ot + h * stride_oh
    dout = tl.load(dout_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + h * rows + row, tl.sum(out * dout, 1), mask=row < rows)


@triton.jit
def _load_rows(base, i0, n, other, BLOCK: tl.constexpr):
    i = i0 + tl.arange(0, BLOCK)
    return tl.load(base + i, mask=i < n, other=other)


@triton.jit
def _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, DROPOUT: tl.constexpr):
    """Attention weights after dropout, and dS up to the factor 1/sqrt(D); rows outside have lse = inf."""
    w = tl.where(valid, tl.math.exp2(s * scale - lse[:, None]), 0.0)
    dropped = w
    if DROPOUT:
        dropped = tl.where(keep, w * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dropped, w * (dp - delta[:, None])


@triton.jit
def _backward_query(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BLOCK
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    if i0 < queries:
        i = tl.arange(0, BLOCK)
        upper = i[None, :] > i[:, None]
        upper_band = i[None, :] + i[:, None] + 1 < BLOCK
        scale = tl.cast(scale, tl.float32)
        keep_scale = tl.cast(keep_scale, tl.float32)
        k_base = k_ptr + b.to(tl.int64) * stride_kb + start * stride_kt + h.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + start * stride_vt + h.to(tl.int64) * stride_vh
        q_base = q_ptr + b.to(tl.int64) * stride_qb + start * stride_qt + h.to(tl.int64) * stride_qh
        dout_base = dout_ptr + b.to(tl.int64) * stride_ob + start * stride_ot + h.to(tl.int64) * stride_oh
        pos_base = pos_ptr + h.to(tl.int64) * stride_ph
        q = _load_tile(q_base, i0, queries, stride_qt, D, BLOCK, BLOCK_D)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, BLOCK, BLOCK_D)
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
        flat = h.to(tl.int64) * rows + first
        lse = _load_rows(lse_ptr + flat, i0, queries, float("inf"), BLOCK)
        delta = _load_rows(delta_ptr + flat, i0, queries, 0.0, BLOCK)

        p_previous = _load_tile(pos_base, T - i0 - BLOCK, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
        previous = _rotate(tl.dot(qv, tl.trans(p_previous), input_precision=PRECISION), BLOCK)
        dband = tl.zeros((BLOCK, BLOCK), q.dtype)  # what this tile adds to the next tile's dR
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for j0 in range(0, keys, BLOCK):
            p = _load_tile(pos_base, T - i0 + j0, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
            rotated = _rotate(tl.dot(qv, tl.trans(p), input_precision=PRECISION), BLOCK)
            k = _load_tile(k_base, j0, keys, stride_kt, D, BLOCK, BLOCK_D)
            s = tl.dot(qu, tl.trans(k), tl.where(upper, rotated, previous), input_precision=PRECISION)
            previous = rotated
            v = _load_tile(v_base, j0, keys, stride_vt, D, BLOCK, BLOCK_D)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            keep = upper
            if DROPOUT:
                keep = dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, BLOCK)
            valid = (j0 + i < keys)[None, :]
            _, ds = _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, DROPOUT)
            ds = ds.to(q.dtype)
            acc = tl.dot(ds, k, acc, input_precision=PRECISION)
            band = _rotate_back(ds, BLOCK)
            # the lower triangle completes the dR of the previous tile
            p_previous = _load_tile(pos_base, T - i0 + j0 - BLOCK, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
            acc = tl.dot(tl.where(upper_band, dband, band), p_previous, acc, input_precision=PRECISION)
            dband = band
        last = (keys + BLOCK - 1) // BLOCK * BLOCK - BLOCK
        p = _load_tile(pos_base, T - i0 + last, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
        acc = tl.dot(tl.where(upper_band, dband, 0.0).to(p.dtype), p, acc, input_precision=PRECISION)
        acc = acc * tl.cast(grad_scale, tl.float32)
        _store_tile(dq_ptr + (first * H + h) * D, i0, queries, H * D, acc, D, BLOCK, BLOCK_D)


@triton.jit
def _backward_key(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, du_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    j0 = tl.program_id(0) * BLOCK
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    upper_band = i[None, :] + i[:, None] + 1 < BLOCK
    scale = tl.cast(scale, tl.float32)
    keep_scale = tl.cast(keep_scale, tl.float32)
    grad_scale = tl.cast(grad_scale, tl.float32)
    k_base = k_ptr + b.to(tl.int64) * stride_kb + start * stride_kt + h.to(tl.int64) * stride_kh
    v_base = v_ptr + b.to(tl.int64) * stride_vb + start * stride_vt + h.to(tl.int64) * stride_vh
    q_base = q_ptr + b.to(tl.int64) * stride_qb + start * stride_qt + h.to(tl.int64) * stride_qh
    dout_base = dout_ptr + b.to(tl.int64) * stride_ob + start * stride_ot + h.to(tl.int64) * stride_oh
    pos_base = pos_ptr + h.to(tl.int64) * stride_ph
    lse_base = lse_ptr + h.to(tl.int64) * rows + first
    delta_base = delta_ptr + h.to(tl.int64) * rows + first
    k = _load_tile(k_base, j0, keys, stride_kt, D, BLOCK, BLOCK_D)
    v = _load_tile(v_base, j0, keys, stride_vt, D, BLOCK, BLOCK_D)
    valid = (j0 + i < keys)[None, :]

    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    column = tl.zeros((BLOCK,), tl.float32)  # sum over the queries of dS
    for i0 in range(0, tl.where(j0 < keys, queries, 0), BLOCK):
        q = _load_tile(q_base, i0, queries, stride_qt, D, BLOCK, BLOCK_D)
        qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
        p = _load_tile(pos_base, T - i0 + j0, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
        band = tl.dot(qv, tl.trans(p), input_precision=PRECISION)
        p = _load_tile(pos_base, T - i0 + j0 - BLOCK, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)
        band = tl.where(upper_band, band, tl.dot(qv, tl.trans(p), input_precision=PRECISION))
        qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
        s = tl.dot(qu, tl.trans(k), _rotate(band, BLOCK), input_precision=PRECISION)
        dout = _load_tile(dout_base, i0, queries, stride_ot, D, BLOCK, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        lse = _load_rows(lse_base, i0, queries, float("inf"), BLOCK)
        delta = _load_rows(delta_base, i0, queries, 0.0, BLOCK)
        keep = upper_band
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), 0, bh, i0 + i, j0, threshold, BLOCK)
        w, ds = _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, DROPOUT)
        dv = tl.dot(tl.trans(w.to(q.dtype)), dout, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), qu, dk, input_precision=PRECISION)
        column += tl.sum(ds, 0)

    _store_tile(dk_ptr + (first * H + h) * D, j0, queries, H * D, dk * grad_scale, D, BLOCK, BLOCK_D)
    _store_tile(dv_ptr + (first * H + h) * D, j0, queries, H * D, dv, D, BLOCK, BLOCK_D)
    du = tl.sum(column[:, None] * k.to(tl.float32), 0) * grad_scale
    # du_ptr: [B, H, tiles, D]
    tile = bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(du_ptr + tile * D + d, du, mask=d < D)


@triton.jit
def _backward_position(
    q_ptr, k_ptr, v_ptr, pos_ptr, u_ptr, v_bias_ptr, dout_ptr, lse_ptr, delta_ptr, dpos_ptr, dv_bias_ptr,
    lengths_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    stride_pt, stride_ph,
    B, T, H, rows, scale, grad_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows T + diagonal ... of dpos, over a slice of the batch.

    Query tile i0 meets these positions in the upper triangle of the key tile at i0 + diagonal and in the lower triangle of
    the next one; the two triangles are worked on as one square tile, in which the rotated R fits without a second product.
    """
    tiles = tl.num_programs(0) // 2
    diagonal = (tl.program_id(0) - tiles) * BLOCK
    h = tl.program_id(1)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    upper = i[None, :] > i[:, None]
    scale = tl.cast(scale, tl.float32)
    keep_scale = tl.cast(keep_scale, tl.float32)
    grad_scale = tl.cast(grad_scale, tl.float32)
    p = _load_tile(pos_ptr + h.to(tl.int64) * stride_ph, T + diagonal, 2 * T - 1, stride_pt, D, BLOCK, BLOCK_D)

    dpos = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    column = tl.zeros((BLOCK,), tl.float32)  # sum over batch and queries of dR
    for b in range(B * part // parts, B * (part + 1) // parts):
        start, first, queries, keys = _sequence(b, T, lengths_ptr, cu_seqlens_ptr)
        b64 = tl.cast(b, tl.int64)
        k_base = k_ptr + b64 * stride_kb + start * stride_kt + h.to(tl.int64) * stride_kh
        v_base = v_ptr + b64 * stride_vb + start * stride_vt + h.to(tl.int64) * stride_vh
        q_base = q_ptr + b64 * stride_qb + start * stride_qt + h.to(tl.int64) * stride_qh
        dout_base = dout_ptr + b64 * stride_ob + start * stride_ot + h.to(tl.int64) * stride_oh
        lse_base = lse_ptr + h.to(tl.int64) * rows + first
        delta_base = delta_ptr + h.to(tl.int64) * rows + first
        for i0 in range(tl.maximum(0, -diagonal - BLOCK), tl.minimum(queries, keys - diagonal), BLOCK):
            j0 = i0 + diagonal
            q = _load_tile(q_base, i0, queries, stride_qt, D, BLOCK, BLOCK_D)
            qv = _add_bias(q, v_bias_ptr, h, D, BLOCK_D)
            qu = _add_bias(q, u_ptr, h, D, BLOCK_D)
            k = _load_tile(k_base, j0, keys, stride_kt, D, BLOCK, BLOCK_D)
            k_next = _load_tile(k_base, j0 + BLOCK, keys, stride_kt, D, BLOCK, BLOCK_D)
            content = tl.dot(qu, tl.trans(k), input_precision=PRECISION)
            content = tl.where(upper, content, tl.dot(qu, tl.trans(k_next), input_precision=PRECISION))
            s = content + _rotate(tl.dot(qv, tl.trans(p), input_precision=PRECISION), BLOCK)
            dout = _load_tile(dout_base, i0, queries, stride_ot, D, BLOCK, BLOCK_D)
            v = _load_tile(v_base, j0, keys, stride_vt, D, BLOCK, BLOCK_D)
            v_next = _load_tile(v_base, j0 + BLOCK, keys, stride_vt, D, BLOCK, BLOCK_D)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            dp = tl.where(upper, dp, tl.dot(dout, tl.trans(v_next), input_precision=PRECISION))
            lse = _load_rows(lse_base, i0, queries, float("inf"), BLOCK)
            delta = _load_rows(delta_base, i0, queries, 0.0, BLOCK)
            key = j0 + i[None, :] + tl.where(upper, 0, BLOCK)  # [BLOCK, BLOCK]
            keep = upper
            if DROPOUT:
                seed = tl.load(seed_ptr)
                keep = dropout_keep(seed, 0, b * H + h, i0 + i, j0, threshold, BLOCK)
                keep_next = dropout_keep(seed, 0, b * H + h, i0 + i, j0 + BLOCK, threshold, BLOCK)
                keep = (upper & keep) | ((~upper) & keep_next)
            valid = (key >= 0) & (key < keys)
            _, ds = _weights_and_ds(s, dp, lse, delta, valid, keep, scale, keep_scale, DROPOUT)
            band = _rotate_back(ds, BLOCK)
            dpos = tl.dot(tl.trans(band.to(q.dtype)), qv, dpos, input_precision=PRECISION)
            column += tl.sum(band, 0)

    # dpos_ptr: [parts, 2T-1, H, D]
    out = dpos_ptr + (part.to(tl.int64) * (2 * T - 1) * H + h) * D
    _store_tile(out, T + diagonal, 2 * T - 1, H * D, dpos * grad_scale, D, BLOCK, BLOCK_D)
    dv_bias = tl.sum(column[:, None] * p.to(tl.float32), 0) * grad_scale
    # dv_bias_ptr: [parts, H, 2 tiles, D]
    tile = (part * tl.num_programs(1) + h) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dv_bias_ptr + tile * D + d, dv_bias, mask=d < D)


def config_for(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    return LaunchConfig(num_warps=4, num_stages=2, blocks={"BLOCK": 64, "BLOCK_D": max(16, next_power_of_2(head_dim))})


def _precision(dtype: torch.dtype) -> str:
    """float32 products as PyTorch's own matmuls do them: TF32 if allowed, else three TF32 products, about 1e-6."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _dropout_args(seed: Tensor | None, p: float) -> dict[str, Any]:
    return {
        "seed_ptr": seed,
        "threshold": dropout_threshold(p),
        "keep_scale": dropout_scale(p),
        "DROPOUT": seed is not None,
    }


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"stride_{name}b", f"stride_{name}t", f"stride_{name}h"), x.stride()))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    u: Tensor,
    v_bias: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and the log2-sum-exp2 of the scaled scores in float32 [H, B*T].

    `seed` is an int64 scalar tensor, or None for no dropout; shapes have been checked.
    """
    b, t, h, d = q.shape
    out = q.new_empty(b, t, h, d)
    lse = q.new_empty(h, b * t, dtype=torch.float32)
    q, k, v, pos = (unit_stride(x) for x in (q, k, v, pos))
    config = config_for("forward", arch_of(q), q.dtype, d)
    launch(
        _forward,
        (cdiv(t, config.blocks["BLOCK"]), b * h),
        config,
        q,
        q_ptr=q, k_ptr=k, v_ptr=v, pos_ptr=pos, u_ptr=u.contiguous(), v_bias_ptr=v_bias.contiguous(),
        out_ptr=out, lse_ptr=lse, lengths_ptr=lengths, cu_seqlens_ptr=None,
        **_strides("q", q), **_strides("k", k), **_strides("v", v), stride_pt=pos.stride(0), stride_ph=pos.stride(1),
        T=t, H=h, rows=b * t, scale=math.log2(math.e) / math.sqrt(d), D=d, PRECISION=_precision(q.dtype),
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
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pos, u, v_bias, in their dtypes, from what `forward` returned."""
    b, t, h, d = q.shape
    dout, q, k, v, pos = (unit_stride(x) for x in (dout, q, k, v, pos))
    arch = arch_of(q)
    delta = torch.empty_like(lse)
    delta_config = config_for("delta", arch, q.dtype, d)
    launch(
        _delta, (cdiv(b * t, delta_config.blocks["BLOCK"]), h), delta_config, q,
        out_ptr=out, dout_ptr=dout, delta_ptr=delta, **_strides("o", dout), T=t, H=h, rows=b * t, D=d,
    )  # fmt: skip
    common = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "pos_ptr": pos, "u_ptr": u.contiguous(), "v_bias_ptr": v_bias.contiguous(),
        "dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta, "lengths_ptr": lengths, "cu_seqlens_ptr": None,
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("o", dout),
        "stride_pt": pos.stride(0), "stride_ph": pos.stride(1), "T": t, "H": h, "rows": b * t,
        "scale": math.log2(math.e) / math.sqrt(d), "grad_scale": 1.0 / math.sqrt(d),
        "D": d, "PRECISION": _precision(q.dtype), **_dropout_args(seed, dropout_p),
    }  # fmt: skip

    dq, dk, dv = (q.new_empty(b, t, h, d) for _ in range(3))
    config = config_for("backward_query", arch, q.dtype, d)
    launch(_backward_query, (cdiv(t, config.blocks["BLOCK"]), b * h), config, q, dq_ptr=dq, **common)

    config = config_for("backward_key", arch, q.dtype, d)
    tiles = cdiv(t, config.blocks["BLOCK"])
    du = q.new_empty(b, h, tiles, d, dtype=torch.float32)
    launch(_backward_key, (tiles, b * h), config, q, dk_ptr=dk, dv_ptr=dv, du_ptr=du, **common)

    config = config_for("backward_position", arch, q.dtype, d)
    tiles = 2 * cdiv(t, config.blocks["BLOCK"])
    parts = _position_parts(b, h, tiles)
    dpos = q.new_empty(parts, 2 * t - 1, h, d, dtype=torch.float32)
    dv_bias = q.new_empty(parts, h, tiles, d, dtype=torch.float32)
    launch(
        _backward_position, (tiles, h, parts), config, q, dpos_ptr=dpos, dv_bias_ptr=dv_bias, B=b, **common
    )
    # sums over the partial results: a fixed order, hence the same bits every time
    return (
        dq, dk, dv, dpos.sum(0).to(pos.dtype), du.sum((0, 2)).to(u.dtype), dv_bias.sum((0, 2)).to(v_bias.dtype),
    )  # fmt: skip


def _position_parts(batch: int, heads: int, tiles: int) -> int:
    """Into how many parts the batch is cut: about four blocks for each of 132 multiprocessors."""
    return max(1, min(batch, cdiv(4 * 132, heads * tiles)))


_KERNELS = {
    "forward": _forward,
    "delta": _delta,
    "backward_query": _backward_query,
    "backward_key": _backward_key,
    "backward_position": _backward_position,
}
_POINTERS = {"lse_ptr", "delta_ptr", "du_ptr", "dpos_ptr", "dv_bias_ptr"}  # float32 whatever the inputs are


def _aot_config(name: str, arch: int, dtype: str, head_dim: int, dropout: bool = False) -> AotConfig:
    kernel = _KERNELS[name]
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    config = config_for(name, arch, torch_dtype, head_dim)
    constexprs: dict[str, Any] = {"D": head_dim, "cu_seqlens_ptr": None, **config.blocks}
    if name != "delta":
        constexprs |= {"DROPOUT": dropout, "PRECISION": _precision(torch_dtype)}
    pointers = {n: "*fp32" if n in _POINTERS else f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")}
    pointers |= {"lengths_ptr": "*i64"} | ({"seed_ptr": "*i64"} if dropout else {})
    if not dropout:
        constexprs["seed_ptr"] = None
    scalars = {n: "i32" for n in kernel.arg_names if n.startswith("stride_") or n in ("B", "T", "H", "rows", "threshold")}
    scalars |= dict.fromkeys(("scale", "grad_scale", "keep_scale"), "fp32")
    constexprs = {n: c for n, c in constexprs.items() if n in kernel.arg_names}
    return AotConfig(
        name=f"relpos_attention.{name} D={head_dim}{' dropout' if dropout else ''}",
        kernel=kernel,
        signature=constexpr_signature(kernel, pointers, scalars, constexprs),
        constexprs=constexprs,
        dtype=dtype,
        launch=config,
        divisible=frozenset(n for n in scalars if n.startswith("stride_")),
        tensor_cores=name != "delta",
        spill_budget=None,
    )


def aot_configs(arch: int) -> Iterable[AotConfig]:
    """Every shipped configuration for compute capability `arch`."""
    for name in _KERNELS:
        for dtype in ("bf16", "fp32"):
            for head_dim in (16, 32, 64, 128):
                yield _aot_config(name, arch, dtype, head_dim)
        yield _aot_config(name, arch, "fp16", 64)
        if name != "delta":
            yield _aot_config(name, arch, "bf16", 64, dropout=True)
