"""Triton kernels of ``glu_depthwise_conv``, backward.

The forward keeps the convolution's output ``y``; everything else is recomputed. First dy, through SiLU and norm; then one
kernel that walks over chunks of frames with a window of dy: an own frame of x makes dx, and its GLU against the window
the gradient of all K taps, which stay in registers. Every weight gradient is a sum of per-program partials in a fixed
order: no float atomics, the same bits every run.
"""

# Triton's language joins tuples with + and does not unpack them
# ruff: noqa: RUF005, SIM109

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .common import AotConfig, LaunchConfig, cdiv, dense, launch, next_power_of_2, sigmoid
from .glu_depthwise_conv import (
    LAYER,
    MERGE_GROUP,
    NONE,
    RUNNING,
    RUNTIME,
    SHORT_KERNEL,
    STATS,
    aot,
    channels_from,
    chunks_of,
    conv_config,
    dense_frames,
    filtered,
    frame_at,
    mode_of,
    pointwise_config,
    real_frames,
    stat_strides,
    taps_of,
    window_before,
    zeros_of,
)
from .partials import sum_rows
from .tuning import tuned


@triton.jit(do_not_specialize=RUNTIME)
def _norm_bwd_kernel(
    dout_ptr, y_ptr, mean_ptr, var_ptr, stride_sb, GROUP_C,
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
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
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
    dout_ptr, y_ptr, mean_ptr, var_ptr, stride_sb, GROUP_C,
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
    n = real_frames(lengths_ptr, b, T)
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
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = xhat * gamma + beta
    s = sigmoid(z)
    dz = dout * s * (1.0 + z * (1.0 - s))
    through_stats = tl.where((offs_t < n)[:, None], mean_dz + xhat * mean_dzx, 0.0)
    tl.store(dy_ptr + at, (rstd * (dz * gamma - through_stats)).to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _conv_bwd_kernel(
    dy_ptr, x_ptr, stride_xb, weight_ptr, lengths_ptr, dx_ptr, part_ptr, T, chunks, chunk,
    C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dx, and in part [P, K + 1, C] the sums over a chunk's frames of dy[t] * g[t + k - K // 2], and last of dy[t].

    Either is left out where its pointer is None.
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    start = (program % chunks) * chunk
    end = tl.minimum(start + chunk, T)
    real = tl.minimum(real_frames(lengths_ptr, b, T), end)
    offs_c, mask_c, zero = channels_from(tl.program_id(1) * BLOCK_C, C, BLOCK_C)
    row = b * T + start
    dy_ptr += row * C + offs_c
    x_ptr += b * stride_xb + start.to(tl.int64) * (2 * C) + offs_c
    none = tl.zeros([BLOCK_C], tl.float32)
    if dx_ptr is not None:
        dx_ptr += row * (2 * C) + offs_c
        taps = taps_of(weight_ptr, offs_c, mask_c, K, True, BLOCK_C, STEP)
    if part_ptr is not None:
        sums = zeros_of(K, BLOCK_C)  # of g[t] * dy[t - K // 2 + j]
        sum_dy = none
    window = window_before(dy_ptr, start, T, mask_c, zero, C, K, False, BLOCK_C, STEP)
    for t in range(start, end, STEP):
        dy = dy_ptr + (t - start) * C
        at = (t - start) * (2 * C)
        frames = window
        for u in tl.static_range(STEP):
            mask = mask_c & (zero + t + (K - 1 - K // 2 + u) < T)
            frames = frames + (frame_at(dy + (K - 1 - K // 2 + u) * C, mask, C, False),)
        values = ()  # all loads before the first store, which the compiler would not move them across
        gates = ()
        for u in tl.static_range(STEP):
            mask = mask_c & (zero + t + u < real)
            values = values + (tl.load(x_ptr + at + u * (2 * C), mask=mask, other=0.0),)
            gates = gates + (tl.load(x_ptr + at + (u * (2 * C) + C), mask=mask, other=0.0),)
        for u in tl.static_range(STEP):
            value = values[u].to(tl.float32)
            s = sigmoid(gates[u].to(tl.float32))
            g = value * s
            if dx_ptr is not None:
                # padding gets no gradient
                dvalue = tl.where(mask_c & (zero + t + u < real), filtered(frames, taps, none, u, K) * s, 0.0)
                dgate = dvalue * (value - g)
                mask = mask_c & (zero + t + u < end)
                tl.store(dx_ptr + at + u * (2 * C), dvalue.to(dx_ptr.dtype.element_ty), mask=mask)
                tl.store(dx_ptr + at + (u * (2 * C) + C), dgate.to(dx_ptr.dtype.element_ty), mask=mask)
            if part_ptr is not None:
                sum_dy += tl.where(mask_c & (zero + t + u < end), frames[u + K // 2], 0.0)
                added = ()
                for j in tl.static_range(K):
                    added = added + (tl.fma(g, frames[u + j], sums[j]),)
                sums = added
        window = frames[STEP:]
    if part_ptr is not None:
        part_ptr += program.to(tl.int64) * ((K + 1) * C) + offs_c
        for k in tl.static_range(K):
            tl.store(part_ptr + k * C, sums[K - 1 - k], mask=mask_c)
        tl.store(part_ptr + K * C, sum_dy, mask=mask_c)


# --- launching -------------------------------------------------------------------------------------------------------


def norm_config(channels: int) -> LaunchConfig:
    """Tiles through LayerNorm: up to 512 channels a warp of its own for whole frames, so that sums need no barrier."""
    block_c = max(64, next_power_of_2(channels))
    # two float32 rows of 512 channels spill on sm_100
    block_t = 1024 // block_c if block_c <= 256 else 1
    return LaunchConfig(max(1, block_c // 512), 1, {"BLOCK_T": block_t, "BLOCK_C": block_c})


def conv_bwd_config(channels: int) -> LaunchConfig:
    """Tiles of the convolution: one channel a thread, with K sums, K taps and K - 1 frames in registers."""
    block_c = conv_config(channels, 1, False).blocks["BLOCK_C"]
    return LaunchConfig(block_c // 32, 1, {"BLOCK_C": block_c, "STEP": 10})


# what may be tuned
_ROW_LIMITS = {"BLOCK_T": (1, 16)}
_POINTWISE_LIMITS = {"BLOCK_T": (1, 64)}
_CONV_LIMITS = {"STEP": (5, 20)}


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
    x, dout, weight = dense_frames(x), dout.contiguous(), weight.contiguous()
    lengths, norm_weight, norm_bias = dense(lengths, norm_weight, norm_bias)
    mode = mode_of(norm, training)
    dy = torch.empty_like(y)
    dx = x.new_empty(x.shape) if dx is None else dx

    heuristic, limits = (norm_config(c), _ROW_LIMITS) if mode == LAYER else (pointwise_config(), _POINTWISE_LIMITS)
    config = tuned("glu_depthwise_conv.backward_norm", x, heuristic, limits)
    blocks = config.blocks
    channel_blocks = cdiv(c, blocks["BLOCK_C"])
    # programs of LayerNorm are of one warp: eight for each of 132 multiprocessors
    chunks, chunk = chunks_of(b, t, (1056 if mode == LAYER else 512) // channel_blocks, blocks["BLOCK_T"])
    part_norm = x.new_empty((b * chunks, 2, c), dtype=torch.float32) if mode != NONE else None
    statistics = (mean, var, *stat_strides(norm, num_groups, c), norm_weight, norm_bias)
    launch(
        _norm_bwd_kernel, (b * chunks, channel_blocks), config, x,
        dout, y, *statistics, dy, part_norm, t, c, chunks, chunk, eps, NORM=mode,
    )  # fmt: skip
    if mode == STATS and part_norm is not None:
        if norm == "batch":
            sums = sum_rows(part_norm, torch.float32)  # [2, C]
            part_norm = sums[None]
        else:
            sums = x.new_empty((b, num_groups, 2), dtype=torch.float32)
            launch(
                _group_sums_kernel, (b, num_groups), MERGE_GROUP, x,
                part_norm, norm_weight, sums, c, chunks, c // num_groups,
            )  # fmt: skip
        tiles = cdiv(t, blocks["BLOCK_T"])
        launch(
            _stats_bwd_kernel, (b * tiles, channel_blocks), config, x,
            dout, y, *statistics, lengths, sums, count, dy, t, c, tiles, eps, BATCH=norm == "batch",
        )  # fmt: skip

    config = tuned("glu_depthwise_conv.backward_conv", x, conv_bwd_config(c), _CONV_LIMITS)
    # 8 warps for each of 132 multiprocessors; more would write more partial sums
    chunks, chunk = chunks_of(b, t, 132 * 256 // c, config.blocks["STEP"])
    part = x.new_empty((b * chunks, k + 1, c), dtype=torch.float32)
    # the sums, taps and frames of a long kernel are too many for one program's registers
    for dx_or_none, part_or_none in ((dx, part),) if k <= SHORT_KERNEL else ((dx, None), (None, part)):
        launch(
            _conv_bwd_kernel, (b * chunks, cdiv(c, config.blocks["BLOCK_C"])), config, x,
            dy, x, x.stride(0), weight, lengths, dx_or_none, part_or_none, t, chunks, chunk, C=c, K=k,
        )  # fmt: skip
    if part_norm is None or norm_weight is None:
        part_norm, norm_dtype = x.new_empty((0, 0), dtype=torch.float32), x.dtype
    else:
        norm_dtype = norm_weight.dtype
    if partial:
        # weight and bias are rows of the same partial sums, which only a sum takes apart without a copy
        sums = sum_rows(part, torch.float32)
        return dx, sums[None, :k], sums[None, k], part_norm
    sums = sum_rows(part, weight.dtype)
    dnorm = part_norm[0].to(norm_dtype) if len(part_norm) == 1 else sum_rows(part_norm, norm_dtype)
    return dx, sums[:k], sums[k].clone(), dnorm


# --- ahead of time ---------------------------------------------------------------------------------------------------


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The convolution at each kernel size, and the way through each norm."""
    no_norm: dict[str, Any] = dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"))
    pointwise = pointwise_config()
    for dtype in ("bf16", "fp32"):
        for c in (256, 512, 1024, 2048):
            yield aot(f"norm_bwd layer C={c}", _norm_bwd_kernel, dtype, norm_config(c), NORM=LAYER.value)
        yield aot("conv_bwd K=31", _conv_bwd_kernel, dtype, conv_bwd_config(256), C=256, K=31)
    dtype = "bf16"
    conv = conv_bwd_config(256)
    yield aot("conv_bwd K=7", _conv_bwd_kernel, dtype, conv, C=256, K=7)
    yield aot("conv_bwd input K=63", _conv_bwd_kernel, dtype, conv, C=256, K=63, part_ptr=None)
    yield aot("conv_bwd weight K=63", _conv_bwd_kernel, dtype, conv, C=256, K=63, dx_ptr=None)
    yield aot("norm_bwd none", _norm_bwd_kernel, dtype, pointwise, NORM=NONE.value, part_ptr=None, **no_norm)
    yield aot("norm_bwd running", _norm_bwd_kernel, dtype, pointwise, NORM=RUNNING.value, GROUP_C=1)
    yield aot("norm_bwd statistics", _norm_bwd_kernel, dtype, pointwise, NORM=STATS.value)
    yield aot("stats_bwd batch", _stats_bwd_kernel, dtype, pointwise, BATCH=True, GROUP_C=1)
    yield aot("stats_bwd group", _stats_bwd_kernel, dtype, pointwise, BATCH=False)
    yield aot("group_sums", _group_sums_kernel, "fp32", MERGE_GROUP)
