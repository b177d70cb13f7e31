"""Triton kernels of ``glu_depthwise_conv``: GLU, padding zeroed, depthwise convolution, norm, SiLU; channels last.

A program holds R consecutive output frames per lane row in registers and slides over the input frames, so a frame
passes the GLU once per R + K - 1 window instead of once per tap; K is a loop bound, and one binary serves every K.

Norms: ``none``, ``running`` (BatchNorm in evaluation, folded into the store), ``layer`` (the program owns all channels
of its frames), ``batch`` and ``group`` (two phases: the convolution leaves count/mean/M2 of its tile, a second kernel
merges them in a fixed order, a third normalises).

The backward keeps the convolution's output ``y`` and recomputes everything else. Every weight gradient is a sum
of per-program partials in a fixed order: no float atomics, the same bits every run.
"""

# Triton's language joins tuples with + and knows neither unpacking nor `in`
# ruff: noqa: RUF005, SIM109

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    AotConfig,
    LaunchConfig,
    cdiv,
    constexpr_signature,
    dense,
    launch,
    next_power_of_2,
    sigmoid,
)
from .partials import sum_rows
from .tuning import tuned

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("T", "K", "P", "tiles", "TILE", "chunks", "chunk", "lane")

NONE, RUNNING, LAYER, STATS = (tl.constexpr(i) for i in range(4))


# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _real_frames(lengths_ptr, b, T):
    """Return the number of real frames of utterance b, at most T."""
    if lengths_ptr is None:
        return tl.cast(T, tl.int32)
    else:
        return tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32)


@triton.jit
def _frame(ptr, offs_t, stride_t, gate, n, mask_c, GLU: tl.constexpr):
    """Frames offs_t of a [*, C] tensor as float32 [BLOCK_S, BLOCK_C], zero outside of 0 ... n-1; GLU halves joined."""
    mask = ((offs_t >= 0) & (offs_t < n))[:, None] & mask_c[None, :]
    p = ptr + offs_t.to(tl.int64)[:, None] * stride_t
    value = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    if GLU:
        value = value * sigmoid(tl.load(p + gate, mask=mask, other=0.0).to(tl.float32))
    return value


@triton.jit
def _slide(
    ptr, stride_t, gate, n, taps_ptr, C, mask_c, offs_t, K, init,
    GLU: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """out[r] = init + sum_k frame[offs_t + r + k - K // 2] * taps[k] for r < BLOCK_R, as a tuple of tiles.

    taps [*, C] has zero rows from K up to a multiple of TAPS.
    """
    first = offs_t - K // 2
    acc = ()
    window = ()  # frames first + k ... first + k + BLOCK_R - 2
    for _ in tl.static_range(BLOCK_R):
        acc = acc + (init,)
    for r in tl.static_range(BLOCK_R - 1):
        window = window + (_frame(ptr, first + r, stride_t, gate, n, mask_c, GLU),)
    for k in range(0, K, TAPS):
        frames = window
        for j in tl.static_range(TAPS):
            frames = frames + (_frame(ptr, first + k + (BLOCK_R - 1 + j), stride_t, gate, n, mask_c, GLU),)
        for j in tl.static_range(TAPS):
            w = tl.load(taps_ptr + (k + j) * C, mask=mask_c, other=0.0).to(tl.float32)[None, :]
            summed = ()
            for r in tl.static_range(BLOCK_R):
                summed = summed + (acc[r] + frames[r + j] * w,)
            acc = summed
        window = frames[TAPS:]
    return acc


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def _conv_fwd_kernel(
    x_ptr, stride_xb, stride_xt, stride_xc, taps_ptr, bias_ptr, lengths_ptr,
    norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr,
    out_ptr, y_ptr, part_mean_ptr, part_m2_ptr, T, C, K, tiles, eps,
    NORM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_S * BLOCK_R frames of one utterance and BLOCK_C channels."""
    tile = tl.program_id(0)
    b = (tile // tiles).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    wide_c = offs_c.to(tl.int64)
    offs_t = (tile % tiles) * (BLOCK_S * BLOCK_R) + tl.arange(0, BLOCK_S) * BLOCK_R
    n = _real_frames(lengths_ptr, b, T)

    init = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        init += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    acc = _slide(
        x_ptr + b * stride_xb + (wide_c * stride_xc)[None, :], stride_xt, tl.cast(C, tl.int64) * stride_xc, n,
        taps_ptr + offs_c, C, mask_c, offs_t, K, init, True, BLOCK_R, TAPS,
    )  # fmt: skip

    if NORM == RUNNING or NORM == LAYER:
        gamma = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        beta = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if NORM == RUNNING:
        rstd = tl.rsqrt(
            tl.load(running_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32) + tl.cast(eps, tl.float32)
        )
        scale = gamma * rstd[None, :]
        shift = beta - tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :] * scale

    base = b * T * C + wide_c[None, :]
    for r in tl.static_range(BLOCK_R):
        y = acc[r]
        at = base + (offs_t + r).to(tl.int64)[:, None] * C
        mask = (offs_t + r < T)[:, None] & mask_c[None, :]
        if y_ptr is not None:
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        if NORM != STATS:
            if NORM == RUNNING:
                y = y * scale + shift
            if NORM == LAYER:
                mean = tl.sum(tl.where(mask_c[None, :], y, 0.0), 1) / C
                centred = tl.where(mask_c[None, :], y - mean[:, None], 0.0)
                rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + tl.cast(eps, tl.float32))
                y = centred * rstd[:, None] * gamma + beta
            tl.store(out_ptr + at, (y * sigmoid(y)).to(out_ptr.dtype.element_ty), mask=mask)

    if NORM == STATS:
        # count, mean and M2 of the tile's real frames, of y as stored; the count follows from the length
        dtype = y_ptr.dtype.element_ty
        start = (tile % tiles) * (BLOCK_S * BLOCK_R)
        count = tl.minimum(tl.maximum(n - start, 0), BLOCK_S * BLOCK_R).to(tl.float32)
        total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for r in tl.static_range(BLOCK_R):
            total += tl.where((offs_t + r < n)[:, None], acc[r].to(dtype).to(tl.float32), 0.0)
        mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
        square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for r in tl.static_range(BLOCK_R):
            d = tl.where((offs_t + r < n)[:, None], acc[r].to(dtype).to(tl.float32) - mean[None, :], 0.0)
            square += d * d
        at = tile.to(tl.int64) * C + offs_c
        tl.store(part_mean_ptr + at, mean, mask=mask_c)
        tl.store(part_m2_ptr + at, tl.sum(square, 0), mask=mask_c)


@triton.jit
def _merge(count, mean, m2, part_count, part_mean, part_m2):
    """Statistics of [P, N] partials (sums over axis 0) joined to running (count, mean, M2) [N] (Chan et al. 1983)."""
    n = tl.sum(part_count, 0)
    mu = tl.sum(part_count * part_mean, 0) / tl.maximum(n, 1.0)
    d = part_mean - mu[None, :]
    spread = tl.sum(part_m2 + part_count * d * d, 0)
    total = tl.maximum(count + n, 1.0)
    delta = mu - mean
    return count + n, mean + delta * (n / total), m2 + spread + delta * delta * (count * n / total)


@triton.jit(do_not_specialize=RUNTIME)
def _merge_batch_kernel(
    part_mean_ptr, part_m2_ptr, lengths_ptr, mean_ptr, var_ptr, count_ptr, T, C, tiles, P, TILE,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, variance and count per channel over all real frames; part_* [P, C] with P = B * tiles."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        if lengths_ptr is None:
            n = tl.zeros([BLOCK_P], tl.int32) + T
        else:
            n = tl.minimum(tl.load(lengths_ptr + offs_p // tiles, mask=offs_p < P, other=0), T).to(tl.int32)
        part_count = tl.minimum(tl.maximum(n - (offs_p % tiles) * TILE, 0), TILE)
        part_count = tl.where(offs_p < P, part_count, 0).to(tl.float32)[:, None] + tl.zeros(
            [BLOCK_P, BLOCK_C], tl.float32
        )
        mask = (offs_p < P)[:, None] & (offs_c < C)[None, :]
        at = offs_p.to(tl.int64)[:, None] * C + offs_c[None, :]
        part_mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
        part_m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
        count, mean, m2 = _merge(count, mean, m2, part_count, part_mean, part_m2)
    tl.store(mean_ptr + offs_c, mean, mask=offs_c < C)
    tl.store(var_ptr + offs_c, m2 / tl.maximum(count, 1.0), mask=offs_c < C)
    tl.store(count_ptr + offs_c, count, mask=offs_c < 1)


@triton.jit(do_not_specialize=RUNTIME)
def _merge_group_kernel(
    part_mean_ptr, part_m2_ptr, lengths_ptr, mean_ptr, var_ptr, T, C, tiles, TILE, GROUP_C, BLOCK_P: tl.constexpr
):
    """Mean and variance of one group of one utterance, over its channels and real frames; part_* [B, tiles, C]."""
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    n = _real_frames(lengths_ptr, b, T)
    count = tl.zeros([1], tl.float32)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    for start in range(0, tiles * GROUP_C, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        tile = offs // GROUP_C
        mask = tile < tiles
        part_count = tl.where(mask, tl.minimum(tl.maximum(n - tile * TILE, 0), TILE), 0).to(tl.float32)
        at = (b * tiles + tile) * C + g * GROUP_C + offs % GROUP_C
        part_mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
        part_m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
        count, mean, m2 = _merge(count, mean, m2, part_count[:, None], part_mean[:, None], part_m2[:, None])
    at = b * tl.num_programs(1) + g + tl.arange(0, 1)
    tl.store(mean_ptr + at, mean)
    tl.store(var_ptr + at, m2 / tl.maximum(count, 1.0))


@triton.jit(do_not_specialize=RUNTIME)
def _norm_fwd_kernel(
    y_ptr, mean_ptr, var_ptr, stride_sb, GROUP_C, norm_weight_ptr, norm_bias_ptr, out_ptr, T, C, tiles, eps,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """silu(norm(y)) with statistics of index b * stride_sb + c // GROUP_C."""
    tile = tl.program_id(0)
    b = (tile // tiles).to(tl.int64)
    offs_t = (tile % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    at_stat = b * stride_sb + offs_c // GROUP_C
    rstd = tl.rsqrt(tl.load(var_ptr + at_stat, mask=mask_c, other=1.0) + tl.cast(eps, tl.float32))
    scale = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * rstd
    mean = tl.load(mean_ptr + at_stat, mask=mask_c, other=0.0)
    beta = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mask = (offs_t < T)[:, None] & mask_c[None, :]
    at = (b * T + offs_t.to(tl.int64))[:, None] * C + offs_c[None, :]
    z = (tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :]
    tl.store(out_ptr + at, (z * sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def _norm_bwd_kernel(
    dout_ptr, stride_db, stride_dt, stride_dc, y_ptr, mean_ptr, var_ptr, stride_sb, GROUP_C,
    norm_weight_ptr, norm_bias_ptr, dy_ptr, part_ptr, T, C, chunks, chunk, eps,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Through SiLU and norm: dy, and per program the channel sums of dz and dz * xhat, z = norm(y), in part [P, 2, C].

    NORM=STATS leaves only the sums: dy needs all of them first.
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    start = (program % chunks) * chunk
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    wide_c = offs_c.to(tl.int64)
    if NORM != NONE:
        gamma = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        beta = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if NORM == RUNNING or NORM == STATS:
        at_stat = b * stride_sb + offs_c // GROUP_C
        mean = tl.load(mean_ptr + at_stat, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        rstd = tl.rsqrt(tl.load(var_ptr + at_stat, mask=mask_c, other=1.0).to(tl.float32) + tl.cast(eps, tl.float32))[
            None, :
        ]
    sum_dz = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    sum_dzx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for t in range(start, tl.minimum(start + chunk, T), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < tl.minimum(start + chunk, T))[:, None] & mask_c[None, :]
        wide_t = offs_t.to(tl.int64)[:, None]
        at = (b * T + wide_t) * C + offs_c[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(
            dout_ptr + b * stride_db + wide_t * stride_dt + (wide_c * stride_dc)[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        xhat = y
        if NORM == LAYER:
            mean = (tl.sum(y, 1) / C)[:, None]
            centred = tl.where(mask_c[None, :], y - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + tl.cast(eps, tl.float32))[:, None]
            xhat = centred * rstd
        if NORM == RUNNING or NORM == STATS:
            xhat = (y - mean) * rstd
        z = xhat
        if NORM != NONE:
            z = xhat * gamma + beta
        s = sigmoid(z)
        dz = dout * s * (1.0 + z * (1.0 - s))
        dy = dz
        if NORM == RUNNING:
            dy = dz * gamma * rstd
        if NORM == LAYER:
            g = dz * gamma
            dy = rstd * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
        if NORM != NONE:
            sum_dz += dz
            sum_dzx += dz * xhat
        if NORM != STATS:
            tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    if NORM != NONE:
        at = program.to(tl.int64) * 2 * C + offs_c
        tl.store(part_ptr + at, tl.sum(sum_dz, 0), mask=mask_c)
        tl.store(part_ptr + at + C, tl.sum(sum_dzx, 0), mask=mask_c)


@triton.jit(do_not_specialize=RUNTIME)
def _group_sums_kernel(part_ptr, norm_weight_ptr, sums_ptr, C, chunks, GROUP_C, BLOCK_P: tl.constexpr):
    """sums [B, G, 2] of gamma * (dz, dz * xhat) over a group, from part [B, chunks, 2, C]."""
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    acc_dz = tl.zeros([BLOCK_P], tl.float32)
    acc_dzx = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, chunks * GROUP_C, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        mask = offs < chunks * GROUP_C
        c = g * GROUP_C + offs % GROUP_C
        gamma = tl.load(norm_weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        at = (b * chunks + offs // GROUP_C) * 2 * C + c
        acc_dz += gamma * tl.load(part_ptr + at, mask=mask, other=0.0)
        acc_dzx += gamma * tl.load(part_ptr + at + C, mask=mask, other=0.0)
    at = (b * tl.num_programs(1) + g) * 2
    tl.store(sums_ptr + at, tl.sum(acc_dz, 0))
    tl.store(sums_ptr + at + 1, tl.sum(acc_dzx, 0))


@triton.jit(do_not_specialize=RUNTIME)
def _stats_bwd_kernel(
    dout_ptr, stride_db, stride_dt, stride_dc, y_ptr, mean_ptr, var_ptr, stride_sb, GROUP_C,
    norm_weight_ptr, norm_bias_ptr, lengths_ptr, sums_ptr, count_ptr, dy_ptr, T, C, tiles, eps,
    BATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy of a norm with statistics over frames. Padded frames are normalised but are not in the statistics.

    sums: BATCH [2, C] of (dz, dz * xhat); else [B, G, 2] of the same times gamma.
    """
    tile = tl.program_id(0)
    b = (tile // tiles).to(tl.int64)
    offs_t = (tile % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n = _real_frames(lengths_ptr, b, T)
    gamma = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    at_stat = b * stride_sb + offs_c // GROUP_C
    mean = tl.load(mean_ptr + at_stat, mask=mask_c, other=0.0)[None, :]
    rstd = tl.rsqrt(tl.load(var_ptr + at_stat, mask=mask_c, other=1.0) + tl.cast(eps, tl.float32))[None, :]
    if BATCH:
        count = tl.maximum(tl.load(count_ptr), 1.0)
        mean_dz = gamma * tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)[None, :] / count
        mean_dzx = gamma * tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0)[None, :] / count
    else:
        count = (tl.maximum(n, 1) * GROUP_C).to(tl.float32)
        mean_dz = tl.load(sums_ptr + 2 * at_stat, mask=mask_c, other=0.0)[None, :] / count
        mean_dzx = tl.load(sums_ptr + 2 * at_stat + 1, mask=mask_c, other=0.0)[None, :] / count
    mask = (offs_t < T)[:, None] & mask_c[None, :]
    wide_t = offs_t.to(tl.int64)[:, None]
    at = (b * T + wide_t) * C + offs_c[None, :]
    xhat = (tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    at_d = b * stride_db + wide_t * stride_dt + (offs_c.to(tl.int64) * stride_dc)[None, :]
    dout = tl.load(dout_ptr + at_d, mask=mask, other=0.0).to(tl.float32)
    z = xhat * gamma + beta
    s = sigmoid(z)
    dz = dout * s * (1.0 + z * (1.0 - s))
    through_stats = tl.where((offs_t < n)[:, None], mean_dz + xhat * mean_dzx, 0.0)
    tl.store(dy_ptr + at, (rstd * (dz * gamma - through_stats)).to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _input_bwd_kernel(
    dy_ptr, x_ptr, stride_xb, stride_xt, stride_xc, taps_ptr, lengths_ptr, dx_ptr, g_ptr,
    T, C, K, tiles,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """dx through the convolution and the GLU, and the GLU's output g again, for the weight gradient."""
    tile = tl.program_id(0)
    b = (tile // tiles).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    wide_c = offs_c.to(tl.int64)
    offs_t = (tile % tiles) * (BLOCK_S * BLOCK_R) + tl.arange(0, BLOCK_S) * BLOCK_R
    n = _real_frames(lengths_ptr, b, T)
    wide = tl.cast(C, tl.int64)
    dg = _slide(
        dy_ptr + b * T * C + offs_c[None, :], wide, wide, T, taps_ptr + offs_c, C, mask_c, offs_t, K,
        tl.zeros([BLOCK_S, BLOCK_C], tl.float32), False, BLOCK_R, TAPS,
    )  # fmt: skip
    for r in tl.static_range(BLOCK_R):
        t = offs_t + r
        wide_t = t.to(tl.int64)[:, None]
        real = (t < n)[:, None] & mask_c[None, :]
        p = x_ptr + b * stride_xb + wide_t * stride_xt + (wide_c * stride_xc)[None, :]
        value = tl.load(p, mask=real, other=0.0).to(tl.float32)
        s = sigmoid(tl.load(p + wide * stride_xc, mask=real, other=0.0).to(tl.float32))
        g = value * s
        dvalue = tl.where(real, dg[r] * s, 0.0)
        mask = (t < T)[:, None] & mask_c[None, :]
        row = b * T + wide_t
        tl.store(g_ptr + row * C + offs_c[None, :], g.to(g_ptr.dtype.element_ty), mask=mask)
        at = row * (2 * C) + offs_c[None, :]
        tl.store(dx_ptr + at, dvalue.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + at + C, (dvalue * value * (1.0 - s)).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _weight_bwd_kernel(
    dy_ptr, g_ptr, part_weight_ptr, part_bias_ptr, T, C, K, chunks, lane,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums over the program's frames of dy[t] * g[t + k - K // 2], part_weight [P, K, C], and of dy[t], part_bias [P, C].

    Each of BLOCK_S lane rows walks `lane` frames (a multiple of STEP) in order, for TAPS taps.
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    k0 = tl.program_id(2) * TAPS
    first = ((program % chunks) * BLOCK_S + tl.arange(0, BLOCK_S)) * lane
    row = b * T * C + offs_c[None, :]
    wide = tl.cast(C, tl.int64)
    shift = k0 - K // 2
    acc = ()
    window = ()  # g at first + shift + i ... + TAPS - 2
    for _ in tl.static_range(TAPS):
        acc = acc + (tl.zeros([BLOCK_S, BLOCK_C], tl.float32),)
    for j in tl.static_range(TAPS - 1):
        window = window + (_frame(g_ptr + row, first + shift + j, wide, wide, T, mask_c, False),)
    acc_bias = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for i in range(0, lane, STEP):
        frames = window
        for v in tl.static_range(STEP):
            frames = frames + (_frame(g_ptr + row, first + shift + i + (TAPS - 1 + v), wide, wide, T, mask_c, False),)
        for v in tl.static_range(STEP):
            dy = _frame(dy_ptr + row, first + i + v, wide, wide, T, mask_c, False)
            acc_bias += dy
            summed = ()
            for j in tl.static_range(TAPS):
                summed = summed + (acc[j] + dy * frames[j + v],)
            acc = summed
        window = frames[STEP:]
    wide_p = program.to(tl.int64)
    for j in tl.static_range(TAPS):
        if k0 + j < K:
            tl.store(part_weight_ptr + (wide_p * K + (k0 + j)) * C + offs_c, tl.sum(acc[j], 0), mask=mask_c)
    if k0 == 0:
        tl.store(part_bias_ptr + wide_p * C + offs_c, tl.sum(acc_bias, 0), mask=mask_c)


# --- launching -------------------------------------------------------------------------------------------------------


def conv_config(channels: int, frames: int, layer: bool) -> LaunchConfig:
    """Tiles of the sliding kernels: two channels a thread keep R = 16 frames in about 125 registers, unspilled.

    LayerNorm needs all channels of a frame in one program, beyond 1024 four a thread with half the window; short
    inputs take R = 8 for twice the programs.
    """
    block_c = max(64, next_power_of_2(channels)) if layer else 64
    block_r = 8 if frames < 256 or block_c > 1024 else 16
    block_s = max(1, 256 // block_c)
    warps = min(16, max(4, block_c * block_s // 64))
    taps = 4 if block_c > 1024 else 8
    return LaunchConfig(warps, 1, {"BLOCK_S": block_s, "BLOCK_R": block_r, "BLOCK_C": block_c, "TAPS": taps})


def weight_config(kernel_size: int) -> LaunchConfig:
    """Tiles of the weight gradient: 16 taps a program (8 for a short kernel) stay in registers."""
    taps = 8 if kernel_size <= 8 else 16
    return LaunchConfig(4, 1, {"BLOCK_S": 4, "BLOCK_C": 64, "TAPS": taps, "STEP": 8})


def norm_config(channels: int, layer: bool) -> LaunchConfig:
    """Tiles of the pointwise kernels: 8 to 16 elements a thread, whole frames for LayerNorm."""
    if not layer:
        return LaunchConfig(4, 1, {"BLOCK_T": 16, "BLOCK_C": 128})
    block_c = max(64, next_power_of_2(channels))
    block_t = max(1, 2048 // block_c)
    return LaunchConfig(min(8, max(4, block_c // 128)), 1, {"BLOCK_T": block_t, "BLOCK_C": block_c})


# what may be tuned; a program of LayerNorm has all channels, so BLOCK_C stays
_CONV_LIMITS = {"BLOCK_R": (4, 16), "TAPS": (4, 8)}
_WEIGHT_LIMITS = {"BLOCK_S": (1, 8), "TAPS": (8, 16)}
_NORM_LIMITS = {"BLOCK_T": (1, 64)}

_MERGE_BATCH = LaunchConfig(4, 1, {"BLOCK_P": 64, "BLOCK_C": 16})
_MERGE_GROUP = LaunchConfig(4, 1, {"BLOCK_P": 1024})


def _chunks(batch: int, frames: int, programs: int, step: int) -> tuple[int, int]:
    """(chunks an utterance, frames a chunk): about `programs` chunks in all, each a multiple of `step` frames.

    A function of shapes alone, so that the order of the sums does not depend on the device.
    """
    want = max(1, programs // max(batch, 1))
    chunk = max(1, cdiv(cdiv(frames, want), step)) * step
    return cdiv(frames, chunk), chunk


def _taps(weight: torch.Tensor, multiple: int) -> torch.Tensor:
    """[C, K] -> [K', C], zero rows up to a multiple: neighbouring channels are neighbours in memory, no tap is masked."""
    return torch.nn.functional.pad(weight.t(), (0, 0, 0, -weight.shape[1] % multiple)).contiguous()


def _mode(norm: str, training: bool) -> tl.constexpr:
    return {"none": NONE, "layer": LAYER, "group": STATS, "batch": STATS if training else RUNNING}[norm]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
    save: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [B, T, C], y, mean, var, count): what the backward needs is filled if `save`, else empty.

    mean, var: float32 [C] (batch) or [B, G] (group); count: float32 [1], real frames of the batch.
    """
    b, t, _ = x.shape
    c, k = weight.shape
    bias, lengths, norm_weight, norm_bias = dense(bias, lengths, norm_weight, norm_bias)
    running_mean, running_var = dense(running_mean, running_var)
    mode = _mode(norm, training)
    stats = mode == STATS
    out = x.new_empty((b, t, c)) if out is None else out
    y = x.new_empty((b, t, c) if save or stats else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))

    config = tuned("glu_depthwise_conv.forward", x, conv_config(c, t, norm == "layer"), _CONV_LIMITS)
    blocks = config.blocks
    taps = _taps(weight, blocks["TAPS"])
    tile = blocks["BLOCK_S"] * blocks["BLOCK_R"]
    tiles = cdiv(t, tile)
    part_mean = part_m2 = None
    if stats:
        part_mean, part_m2 = x.new_empty((2, b, tiles, c), dtype=torch.float32)
    grid = (b * tiles, cdiv(c, blocks["BLOCK_C"]))
    launch(
        _conv_fwd_kernel, grid, config, x, x, *x.stride(), taps, bias, lengths,
        norm_weight, norm_bias, running_mean, running_var, out, y if save or stats else None, part_mean, part_m2,
        t, c, k, tiles, eps, NORM=mode,
    )  # fmt: skip
    if mode == RUNNING and save:
        mean, var = (s.to(torch.float32, copy=True) for s in (running_mean, running_var))
    if not stats:
        return out, y, mean, var, count

    if norm == "batch":
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
        launch(
            _merge_batch_kernel, (cdiv(c, _MERGE_BATCH.blocks["BLOCK_C"]),), _MERGE_BATCH, x,
            part_mean, part_m2, lengths, mean, var, count, t, c, tiles, b * tiles, tile,
        )  # fmt: skip
    else:
        mean, var = (x.new_empty((b, num_groups), dtype=torch.float32) for _ in range(2))
        launch(
            _merge_group_kernel, (b, num_groups), _MERGE_GROUP, x,
            part_mean, part_m2, lengths, mean, var, t, c, tiles, tile, c // num_groups,
        )  # fmt: skip
    config = tuned("glu_depthwise_conv.forward_norm", x, norm_config(c, False), _NORM_LIMITS)
    tiles = cdiv(t, config.blocks["BLOCK_T"])
    grid = (b * tiles, cdiv(c, config.blocks["BLOCK_C"]))
    launch(
        _norm_fwd_kernel, grid, config, x, y, mean, var, *_stat_strides(norm, num_groups, c), norm_weight, norm_bias,
        out, t, c, tiles, eps,
    )  # fmt: skip
    return out, y, mean, var, count


def _stat_strides(norm: str, num_groups: int, channels: int) -> tuple[int, int]:
    """(step from utterance to utterance, channels that share a statistic)."""
    return (num_groups, channels // num_groups) if norm == "group" else (0, 1)


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
    *,
    dx: torch.Tensor | None = None,
    partial: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [B, T, 2C], dweight [K, C] (transposed), dbias [C], (dnorm_bias, dnorm_weight) [2, C] or empty); dx where given.

    With `partial`, the last three are float32 partial sums [P, ...] to be added up over the first dimension.
    """
    b, t, c = y.shape
    k = weight.shape[1]
    lengths, norm_weight, norm_bias = dense(lengths, norm_weight, norm_bias)
    mode = _mode(norm, training)
    dy, g = torch.empty_like(y), torch.empty_like(y)
    dx = x.new_empty(x.shape) if dx is None else dx

    config = tuned("glu_depthwise_conv.backward_norm", x, norm_config(c, norm == "layer"), _NORM_LIMITS)
    blocks = config.blocks
    channel_blocks = cdiv(c, blocks["BLOCK_C"])
    chunks, chunk = _chunks(b, t, 512 // channel_blocks, blocks["BLOCK_T"])
    part = x.new_empty((b * chunks, 2, c), dtype=torch.float32) if mode != NONE else None
    stat_strides = _stat_strides(norm, num_groups, c)
    launch(
        _norm_bwd_kernel, (b * chunks, channel_blocks), config, x, dout, *dout.stride(), y, mean, var, *stat_strides,
        norm_weight, norm_bias, dy, part, t, c, chunks, chunk, eps, NORM=mode,
    )  # fmt: skip
    if mode == STATS:
        if norm == "batch":
            sums = sum_rows(part, torch.float32)  # [2, C]
        else:
            sums = x.new_empty((b, num_groups, 2), dtype=torch.float32)
            launch(
                _group_sums_kernel, (b, num_groups), _MERGE_GROUP, x, part, norm_weight, sums, c, chunks, c // num_groups,
            )  # fmt: skip
        tiles = cdiv(t, blocks["BLOCK_T"])
        launch(
            _stats_bwd_kernel, (b * tiles, channel_blocks), config, x, dout, *dout.stride(), y, mean, var,
            *stat_strides, norm_weight, norm_bias, lengths, sums, count, dy, t, c, tiles, eps, BATCH=norm == "batch",
        )  # fmt: skip

    config = tuned("glu_depthwise_conv.backward_input", x, conv_config(c, t, False), _CONV_LIMITS)
    blocks = config.blocks
    taps = _taps(weight.flip(1), blocks["TAPS"])
    tiles = cdiv(t, blocks["BLOCK_S"] * blocks["BLOCK_R"])
    launch(
        _input_bwd_kernel, (b * tiles, cdiv(c, blocks["BLOCK_C"])), config, x, dy, x, *x.stride(), taps, lengths, dx, g,
        t, c, k, tiles,
    )  # fmt: skip

    config = tuned("glu_depthwise_conv.backward_weight", x, weight_config(k), _WEIGHT_LIMITS)
    blocks = config.blocks
    channel_blocks, tap_blocks = cdiv(c, blocks["BLOCK_C"]), cdiv(k, blocks["TAPS"])
    # about four programs for each of 132 multiprocessors
    programs = max(1, 528 // (channel_blocks * tap_blocks))
    chunks, chunk = _chunks(b, t, programs, blocks["BLOCK_S"] * blocks["STEP"])
    part_weight = x.new_empty((b * chunks, k, c), dtype=torch.float32)
    part_bias = x.new_empty((b * chunks, c), dtype=torch.float32)
    launch(
        _weight_bwd_kernel, (b * chunks, channel_blocks, tap_blocks), config, x, dy, g, part_weight, part_bias,
        t, c, k, chunks, chunk // blocks["BLOCK_S"],
    )  # fmt: skip
    if part is None or norm_weight is None:
        part, norm_dtype = x.new_empty((0, 0), dtype=torch.float32), x.dtype
    else:
        norm_dtype = norm_weight.dtype
    if partial:
        return dx, part_weight, part_bias, part
    dweight, dbias = (sum_rows(each, weight.dtype) for each in (part_weight, part_bias))
    return dx, dweight, dbias, sum_rows(part, norm_dtype)


# --- ahead of time ---------------------------------------------------------------------------------------------------

_STRIDES = ("stride_sb", "stride_xb", "stride_xt", "stride_db", "stride_dt")
_INTEGERS = ("T", "C", "K", "P", "tiles", "chunks", "chunk", "lane", "TILE", "GROUP_C", *_STRIDES)
_DIVISIBLE = frozenset({"C", "GROUP_C", *_STRIDES})


def _aot(name: str, kernel: Any, dtype: str, launch_config: LaunchConfig, **constexprs: Any) -> AotConfig:
    """Pointers are of `dtype`, but statistics and partials float32 and lengths int64."""
    wide = ("part", "mean", "var", "count", "sums", "running")
    pointers = {
        n: "*i64" if n.startswith("lengths") else "*fp32" if n.startswith(wide) else f"*{dtype}"
        for n in kernel.arg_names
        if n.endswith("_ptr") and n not in constexprs
    }
    scalars = {n: "i32" for n in _INTEGERS if n not in constexprs} | {"eps": "fp32"}
    # channels are neighbours: a stride of 1 is known to the compiler, as at run time
    constexprs = {n: 1 for n in ("stride_xc", "stride_dc") if n in kernel.arg_names} | constexprs
    constexprs |= launch_config.blocks
    return AotConfig(
        name=f"glu_depthwise_conv.{name}",
        kernel=kernel,
        signature=constexpr_signature(kernel, pointers, scalars, constexprs),
        constexprs=constexprs,
        dtype=dtype,
        launch=launch_config,
        divisible=_DIVISIBLE,
        spill_budget=64,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every kernel at the tiles of T = 400, of short inputs and of each width; float16 is as wide as bfloat16."""
    no_norm: dict[str, Any] = dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"))
    no_running: dict[str, Any] = dict.fromkeys(("running_mean_ptr", "running_var_ptr"))
    no_parts: dict[str, Any] = dict.fromkeys(("part_mean_ptr", "part_m2_ptr"))
    none = {"NORM": NONE.value, **no_norm, **no_running, **no_parts}
    stats = {"NORM": STATS.value, **no_running}
    layer = {"NORM": LAYER.value, **no_running, **no_parts}
    plain, short = conv_config(256, 400, False), conv_config(256, 100, False)
    pointwise = norm_config(256, False)
    # what holds frames in registers, in both widths
    for dtype in ("bf16", "fp32"):
        yield _aot("conv_fwd none", _conv_fwd_kernel, dtype, plain, **none)
        for c in (256, 512, 1024, 2048):
            yield _aot(f"conv_fwd layer C={c}", _conv_fwd_kernel, dtype, conv_config(c, 400, True), **layer)
            yield _aot(f"norm_bwd layer C={c}", _norm_bwd_kernel, dtype, norm_config(c, True), NORM=LAYER.value)
        yield _aot("input_bwd", _input_bwd_kernel, dtype, plain)
        yield _aot("weight_bwd K=31", _weight_bwd_kernel, dtype, weight_config(31))
    dtype = "bf16"
    yield _aot("conv_fwd none short", _conv_fwd_kernel, dtype, short, **none)
    yield _aot("conv_fwd running", _conv_fwd_kernel, dtype, plain, NORM=RUNNING.value, **no_parts)
    yield _aot("conv_fwd statistics", _conv_fwd_kernel, dtype, plain, **stats)
    yield _aot("input_bwd short", _input_bwd_kernel, dtype, short)
    yield _aot("weight_bwd K=7", _weight_bwd_kernel, dtype, weight_config(7))
    yield _aot("norm_fwd", _norm_fwd_kernel, dtype, pointwise)
    yield _aot("norm_bwd none", _norm_bwd_kernel, dtype, pointwise, NORM=NONE.value, part_ptr=None, **no_norm)
    yield _aot("norm_bwd running", _norm_bwd_kernel, dtype, pointwise, NORM=RUNNING.value, GROUP_C=1)
    yield _aot("norm_bwd statistics", _norm_bwd_kernel, dtype, pointwise, NORM=STATS.value)
    yield _aot("stats_bwd batch", _stats_bwd_kernel, dtype, pointwise, BATCH=True, GROUP_C=1)
    yield _aot("stats_bwd group", _stats_bwd_kernel, dtype, pointwise, BATCH=False)
    yield _aot("merge_batch", _merge_batch_kernel, "fp32", _MERGE_BATCH)
    yield _aot("merge_group", _merge_group_kernel, "fp32", _MERGE_GROUP)
    yield _aot("group_sums", _group_sums_kernel, "fp32", _MERGE_GROUP)
