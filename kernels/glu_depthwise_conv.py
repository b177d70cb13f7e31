"""Triton kernels of ``glu_depthwise_conv``, forward: GLU, padding zeroed, depthwise convolution, norm, SiLU; channels last.

A program walks over a chunk of frames of one utterance. A thread keeps the K - 1 last frames of its channels after the
GLU, and their K taps, in registers: a frame is read and gated once per chunk, and an output costs K multiply-adds.
Offsets inside a chunk are constants of the compiled code (C and K are), one 64-bit address a step carries them.

Norms: ``none``, ``running`` (BatchNorm in evaluation, folded into the store), ``layer`` (the program owns all channels
of its frames; it normalises rows that it reads back, a whole row to a warp), ``batch`` and ``group`` (two phases: the
convolution leaves mean and M2 of its chunk, a second kernel merges them in a fixed order, a third normalises).
"""

# Triton's language joins tuples with + and does not unpack them
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
    aot_config,
    cdiv,
    dense,
    launch,
    next_power_of_2,
    sigmoid,
)
from .tuning import tuned

# what changes with T or B: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("T", "P", "tiles", "chunks", "chunk")

NONE, RUNNING, LAYER, STATS = (tl.constexpr(i) for i in range(4))


# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def real_frames(lengths_ptr, b, T):
    """Return the number of real frames of utterance b, at most T."""
    if lengths_ptr is None:
        return tl.cast(T, tl.int32)
    else:
        return tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32)


@triton.jit
def channels_from(c0, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_C channels from c0 on, which of them exist, and as many zeros: the interpreter makes masks of blocks alone."""
    offs_c = c0 + tl.arange(0, BLOCK_C)
    # where all do, the compiler drops the mask
    mask_c = offs_c < C if C % BLOCK_C else tl.full([BLOCK_C], True, tl.int1)
    return offs_c, mask_c, tl.zeros([BLOCK_C], tl.int32)


@triton.jit
def frame_at(ptr, mask, C: tl.constexpr, GLU: tl.constexpr):
    """The frame at ptr as float32 [BLOCK_C], zero where masked; with GLU of its two halves, C apart."""
    value = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    if GLU:
        value = value * sigmoid(tl.load(ptr + C, mask=mask, other=0.0).to(tl.float32))
    return value


@triton.jit
def zeros_of(COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """COUNT tensors of zeros [BLOCK_C]."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK_C], tl.float32),)
    return zeros


# The two below load in a loop of STEP and shift, and so compile in a quarter of the time: for each load, Triton's
# coalescing pass visits all other operations.


@triton.jit
def taps_of(
    weight_ptr, offs_c, mask_c,
    K: tl.constexpr, REVERSED: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Taps of weight [C, K] as K float32 tensors [BLOCK_C]."""
    taps = zeros_of(K, BLOCK_C)
    for k in range(K - (K + STEP - 1) // STEP * STEP, K, STEP):
        for u in tl.static_range(STEP):
            at = tl.maximum(k + u, 0)  # what is before the first is shifted out
            if REVERSED:
                at = K - 1 - at
            taps = taps + (tl.load(weight_ptr + offs_c * K + at, mask=mask_c, other=0.0).to(tl.float32),)
        taps = taps[STEP:]
    return taps


@triton.jit
def window_before(
    ptr, t, n, mask_c, zero,
    C: tl.constexpr, K: tl.constexpr, GLU: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The K - 1 frames from t - K // 2 on, which are what an output at t shares with the one before; ptr is at frame t."""
    WIDTH: tl.constexpr = (1 + GLU) * C
    window = zeros_of(K - 1, BLOCK_C)
    for j in range(-((K + STEP - 2) // STEP * STEP) + (K - 1 - K // 2), K - 1 - K // 2, STEP):
        for u in tl.static_range(STEP):
            mask = mask_c & (zero + t + j + u >= 0) & (zero + t + j + u < n)
            window = window + (frame_at(ptr + j * WIDTH + u * WIDTH, mask, C, GLU),)
        window = window[STEP:]
    return window


@triton.jit
def filtered(frames, taps, init, u: tl.constexpr, K: tl.constexpr):
    """init + sum_k frames[u + k] * taps[k]."""
    acc = init
    for k in tl.static_range(K):
        acc = tl.fma(frames[u + k], taps[k], acc)
    return acc


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _convolve(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr, out_ptr, y_ptr,
    part_mean_ptr, part_m2_ptr, start, end, n, c0, eps,
    NORM: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Frames start ... end-1 of an utterance with n real ones, at BLOCK_C channels; x, out and y point at frame start."""
    offs_c, mask_c, zero = channels_from(c0, C, BLOCK_C)
    taps = taps_of(weight_ptr, offs_c, mask_c, K, False, BLOCK_C, STEP)
    init = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        init = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if NORM == RUNNING:
        var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
        scale = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        scale *= tl.rsqrt(var + tl.cast(eps, tl.float32))
        mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) - mean * scale
    total = tl.zeros([BLOCK_C], tl.float32)
    x_ptr += offs_c
    window = window_before(x_ptr, start, n, mask_c, zero, C, K, True, BLOCK_C, STEP)
    for t in range(start, end, STEP):
        step = (t - start) * C + offs_c
        x = x_ptr + ((t - start) * (2 * C))
        frames = window
        for u in tl.static_range(STEP):
            mask = mask_c & (zero + t + (K - 1 - K // 2 + u) < n)
            frames = frames + (frame_at(x + (K - 1 - K // 2 + u) * (2 * C), mask, C, True),)
        for u in tl.static_range(STEP):
            y = filtered(frames, taps, init, u, K)
            mask = mask_c & (zero + t + u < end)
            if y_ptr is not None:
                tl.store(y_ptr + step + u * C, y.to(y_ptr.dtype.element_ty), mask=mask)
            if NORM == STATS:
                total += tl.where(mask & (zero + t + u < n), y.to(y_ptr.dtype.element_ty).to(tl.float32), 0.0)
            if NORM == NONE or NORM == RUNNING:
                if NORM == RUNNING:
                    y = y * scale + shift
                tl.store(out_ptr + step + u * C, (y * sigmoid(y)).to(out_ptr.dtype.element_ty), mask=mask)
        window = frames[STEP:]

    if NORM == STATS:
        # mean and M2 of the chunk's real frames, of y as stored, which this thread reads back; lengths give the count
        count = tl.maximum(tl.minimum(n, end) - start, 0)
        mean = total / tl.maximum(count, 1).to(tl.float32)
        m2 = tl.zeros([BLOCK_C], tl.float32)
        for t in range(0, count, STEP):
            for u in tl.static_range(STEP):
                mask = mask_c & (zero + t + u < count)
                y = tl.load(y_ptr + (t * C + offs_c) + u * C, mask=mask, other=0.0).to(tl.float32)
                d = tl.where(mask, y - mean, 0.0)
                m2 += d * d
        tl.store(part_mean_ptr + offs_c, mean, mask=mask_c)
        tl.store(part_m2_ptr + offs_c, m2, mask=mask_c)


@triton.jit(do_not_specialize=RUNTIME)
def _conv_fwd_kernel(
    x_ptr, stride_xb, weight_ptr, bias_ptr, lengths_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr,
    out_ptr, y_ptr, part_mean_ptr, part_m2_ptr, T, chunks, chunk, eps,
    NORM: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, BLOCK_T: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """One chunk of frames of one utterance; LAYER: at all channels, in rows of BLOCK_T frames and ROW >= C channels."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    start = (program % chunks) * chunk
    end = tl.minimum(start + chunk, T)
    n = real_frames(lengths_ptr, b, T)
    x_ptr += b * stride_xb + start.to(tl.int64) * (2 * C)
    row = b * T + start
    out_ptr += row * C
    if y_ptr is not None:
        y_ptr += row * C
    if part_mean_ptr is not None:
        part_mean_ptr += program.to(tl.int64) * C
        part_m2_ptr += program.to(tl.int64) * C
    if NORM != LAYER:
        _convolve(
            x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr, out_ptr, y_ptr,
            part_mean_ptr, part_m2_ptr, start, end, n, tl.program_id(1) * BLOCK_C, eps, NORM, C, K, BLOCK_C, STEP,
        )  # fmt: skip
    else:
        for c0 in range(0, C, BLOCK_C):
            _convolve(
                x_ptr, weight_ptr, bias_ptr, None, None, None, None, None, y_ptr, None, None,
                start, end, n, c0, eps, NORM, C, K, BLOCK_C, STEP,
            )  # fmt: skip
        # rows come back with other channels to a thread than they were written with
        tl.debug_barrier()
        offs_c, mask_c, _ = channels_from(0, C, ROW)
        gamma = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        beta = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        for t in range(0, end - start, BLOCK_T):
            offs_t = t + tl.arange(0, BLOCK_T)
            mask = (offs_t < end - start)[:, None] & mask_c[None, :]
            at = offs_t[:, None] * C + offs_c[None, :]
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.sum(y, 1) / C
            centred = tl.where(mask_c[None, :], y - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + tl.cast(eps, tl.float32))
            z = centred * rstd[:, None] * gamma + beta
            tl.store(out_ptr + at, (z * sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)


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
    n = real_frames(lengths_ptr, b, T)
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


# --- launching -------------------------------------------------------------------------------------------------------

# registers hold K - 1 frames and K taps a channel: two channels a thread up to this K, one beyond
SHORT_KERNEL = 32
# frames a step: loads in flight, and one move of the window in so many frames
_STEP = 10


def conv_config(channels: int, kernel_size: int, layer: bool) -> LaunchConfig:
    """Tiles of the convolution: 2 channels a thread; LayerNorm's rows are BLOCK_T frames of all (ROW) channels."""
    row = max(64, next_power_of_2(channels))
    if layer:
        block_c = min(256, row)
    else:  # least padding
        block_c = min((256, 128, 64), key=lambda block: cdiv(channels, block) * block)
    warps = block_c // (64 if kernel_size <= SHORT_KERNEL else 32)
    blocks = {
        "BLOCK_C": block_c,
        "STEP": _STEP,
        "BLOCK_T": max(1, 2048 // row) if layer else 1,
        "ROW": row if layer else 1,
    }
    return LaunchConfig(warps, 1, blocks)


def pointwise_config() -> LaunchConfig:
    """Tiles of the pointwise kernels: 16 elements a thread."""
    return LaunchConfig(4, 1, {"BLOCK_T": 16, "BLOCK_C": 128})


# what may be tuned
_CONV_LIMITS = {"STEP": (5, 20)}
_POINTWISE_LIMITS = {"BLOCK_T": (1, 64)}

_MERGE_BATCH = LaunchConfig(4, 1, {"BLOCK_P": 64, "BLOCK_C": 16})
MERGE_GROUP = LaunchConfig(4, 1, {"BLOCK_P": 1024})


def chunks_of(batch: int, frames: int, programs: int, least: int) -> tuple[int, int]:
    """(chunks an utterance, frames a chunk): about `programs` chunks in all, of `least` frames or more.

    A function of shapes alone, so that the order of the sums does not depend on the device.
    """
    chunk = max(least, cdiv(frames, max(1, programs // max(batch, 1))))
    return cdiv(frames, chunk), chunk


def dense_frames(x: torch.Tensor) -> torch.Tensor:
    """[B, T, C] with a frame after the other; a copy where x has them apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def mode_of(norm: str, training: bool) -> tl.constexpr:
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
    x, weight = dense_frames(x), weight.contiguous()
    bias, lengths, norm_weight, norm_bias = dense(bias, lengths, norm_weight, norm_bias)
    running_mean, running_var = dense(running_mean, running_var)
    mode = mode_of(norm, training)
    stats = mode == STATS
    out = x.new_empty((b, t, c)) if out is None else out
    y = x.new_empty((b, t, c) if save or stats else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))

    config = tuned("glu_depthwise_conv.forward", x, conv_config(c, k, mode == LAYER), _CONV_LIMITS)
    # 8 warps for each of 132 multiprocessors
    programs = 264 if mode == LAYER else 264 * 256 // c
    chunks, chunk = chunks_of(b, t, programs, config.blocks["STEP"])
    part_mean = part_m2 = None
    if stats:
        part_mean, part_m2 = x.new_empty((2, b, chunks, c), dtype=torch.float32)
    # LayerNorm reads the convolution back: from out, if nothing is saved
    kept = y if save or stats else out if mode == LAYER else None
    grid = (b * chunks, 1 if mode == LAYER else cdiv(c, config.blocks["BLOCK_C"]))
    launch(
        _conv_fwd_kernel, grid, config, x, x, x.stride(0), weight, bias, lengths, norm_weight, norm_bias,
        running_mean, running_var, out, kept, part_mean, part_m2, t, chunks, chunk, eps, NORM=mode, C=c, K=k,
    )  # fmt: skip
    if mode == RUNNING and save:
        mean, var = (s.to(torch.float32, copy=True) for s in (running_mean, running_var))
    if not stats:
        return out, y, mean, var, count

    if norm == "batch":
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
        launch(
            _merge_batch_kernel, (cdiv(c, _MERGE_BATCH.blocks["BLOCK_C"]),), _MERGE_BATCH, x,
            part_mean, part_m2, lengths, mean, var, count, t, c, chunks, b * chunks, chunk,
        )  # fmt: skip
    else:
        mean, var = (x.new_empty((b, num_groups), dtype=torch.float32) for _ in range(2))
        launch(
            _merge_group_kernel, (b, num_groups), MERGE_GROUP, x,
            part_mean, part_m2, lengths, mean, var, t, c, chunks, chunk, c // num_groups,
        )  # fmt: skip
    config = tuned("glu_depthwise_conv.forward_norm", x, pointwise_config(), _POINTWISE_LIMITS)
    tiles = cdiv(t, config.blocks["BLOCK_T"])
    grid = (b * tiles, cdiv(c, config.blocks["BLOCK_C"]))
    launch(
        _norm_fwd_kernel, grid, config, x, y, mean, var, *stat_strides(norm, num_groups, c), norm_weight, norm_bias,
        out, t, c, tiles, eps,
    )  # fmt: skip
    return out, y, mean, var, count


def stat_strides(norm: str, num_groups: int, channels: int) -> tuple[int, int]:
    """(step from utterance to utterance, channels that share a statistic)."""
    return (num_groups, channels // num_groups) if norm == "group" else (0, 1)


# --- ahead of time ---------------------------------------------------------------------------------------------------


def aot(name: str, kernel: Any, dtype: str, config: LaunchConfig, **constexprs: Any) -> AotConfig:
    """Statistics, their sums and partial results are float32 whatever `dtype` is."""
    wide = ("part", "mean", "var", "count", "sums", "running")
    return aot_config(
        f"glu_depthwise_conv.{name}",
        kernel,
        dtype,
        config,
        constexprs,
        types={n: "*fp32" for n in kernel.arg_names if n.endswith("_ptr") and n.startswith(wide)},
        divisible=("C", "GROUP_C", "stride_sb", "stride_xb"),
        spill_budget=64,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The convolution for each norm, width and kernel size, and the merges of statistics; float16 is as wide as bfloat16."""
    no_norm: dict[str, Any] = dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"))
    no_running: dict[str, Any] = dict.fromkeys(("running_mean_ptr", "running_var_ptr"))
    no_parts: dict[str, Any] = dict.fromkeys(("part_mean_ptr", "part_m2_ptr"))
    base = {"C": 256, "K": 31}
    layer = {"NORM": LAYER.value, **no_running, **no_parts}
    none = {"NORM": NONE.value, **base, **no_norm, **no_running, **no_parts}
    # what holds frames in registers, in both widths
    for dtype in ("bf16", "fp32"):
        yield aot("conv_fwd none", _conv_fwd_kernel, dtype, conv_config(256, 31, False), **none)
        for c in (256, 512, 1024, 2048):
            yield aot(f"conv_fwd layer C={c}", _conv_fwd_kernel, dtype, conv_config(c, 31, True), C=c, K=31, **layer)
    dtype, plain = "bf16", conv_config(256, 31, False)
    for k in (7, 63):
        yield aot(f"conv_fwd layer K={k}", _conv_fwd_kernel, dtype, conv_config(256, k, True), C=256, K=k, **layer)
    yield aot("conv_fwd running", _conv_fwd_kernel, dtype, plain, NORM=RUNNING.value, **base, **no_parts)
    # the op hands it the norm's weights, which it does not read
    yield aot("conv_fwd statistics", _conv_fwd_kernel, dtype, plain, NORM=STATS.value, **base, **no_running)
    yield aot("norm_fwd", _norm_fwd_kernel, dtype, pointwise_config())
    yield aot("merge_batch", _merge_batch_kernel, "fp32", _MERGE_BATCH)
    yield aot("merge_group", _merge_group_kernel, "fp32", MERGE_GROUP)
