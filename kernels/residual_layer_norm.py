"""Triton kernels of ``residual_layer_norm``, one pass each way; ``feed_forward`` takes its LayerNorm from here.

A program owns whole rows. Weight gradients are sums of per-program partials in a fixed order.
"""

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
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    launch,
    next_power_of_2,
    unit_stride,
)
from .partials import sum_rows
from .tuning import tuned

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("M", "rows_each", "threshold")


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _layer_norm_fwd_kernel(
    x_ptr, stride_xm, y_ptr, stride_ym, seed_ptr, weight_ptr, bias_ptr, s_ptr, n_ptr, mean_ptr, rstd_ptr,
    M, D, alpha, threshold, keep_scale, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s = x + alpha * drop(y) and n = LN(s) of rows [M, D]; without y, n = LN(x)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    mask = (rows < M)[:, None] & mask_d
    wide = rows.to(tl.int64)[:, None]
    s = tl.load(x_ptr + wide * stride_xm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + wide * stride_ym + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        y *= tl.cast(alpha, tl.float32)
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), 0, 0, rows, 0, threshold, BLOCK_D)
            y = tl.where(keep, y * tl.cast(keep_scale, tl.float32), 0.0)
        # normalise s as stored, that is, rounded
        s = (s + y).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + wide * D + offs_d[None, :], s, mask=mask)
        s = s.to(tl.float32)
    mean = tl.sum(s, 1) / D
    centred = tl.where(mask_d, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + tl.cast(eps, tl.float32))
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    n = centred * rstd[:, None] * weight + bias
    tl.store(n_ptr + wide * D + offs_d[None, :], n.to(n_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _layer_norm_bwd_kernel(
    dn_ptr, stride_dnm, ds_ptr, stride_dsm, s_ptr, stride_sm, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, seed_ptr,
    dx_ptr, dy_ptr, n_ptr, part_ptr, M, D, rows_each, alpha, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = ds + LN'(dn), dy = alpha * drop'(dx), n = LN(s) again, and part [P, 2, D] of dweight and dbias.

    dy and n are left out where their pointer is None.
    """
    program = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    last = tl.minimum((program + 1) * rows_each, M)
    for start in range(program * rows_each, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & mask_d
        wide = rows.to(tl.int64)[:, None]
        s = tl.load(s_ptr + wide * stride_sm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dn_ptr + wide * stride_dnm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < last, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)[:, None]
        xhat = tl.where(mask, (s - mean) * rstd, 0.0)
        g = dn * weight
        dx = rstd * (g - (tl.sum(g, 1) / D)[:, None] - xhat * (tl.sum(g * xhat, 1) / D)[:, None])
        dx += tl.load(ds_ptr + wide * stride_dsm + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide * D + offs_d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            dy = dx * tl.cast(alpha, tl.float32)
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), 0, 0, rows, 0, threshold, BLOCK_D)
                dy = tl.where(keep, dy * tl.cast(keep_scale, tl.float32), 0.0)
            tl.store(dy_ptr + wide * D + offs_d[None, :], dy.to(dy_ptr.dtype.element_ty), mask=mask)
        if n_ptr is not None:
            bias = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
            n = xhat * weight + bias
            tl.store(n_ptr + wide * D + offs_d[None, :], n.to(n_ptr.dtype.element_ty), mask=mask)
        sum_weight += tl.sum(dn * xhat, 0)
        sum_bias += tl.sum(dn, 0)
    at = program.to(tl.int64) * 2 * D + offs_d
    tl.store(part_ptr + at, sum_weight, mask=offs_d < D)
    tl.store(part_ptr + at + D, sum_bias, mask=offs_d < D)


def row_config(width: int) -> LaunchConfig:
    """Whole rows; up to D = 512 a program is one warp, whose sums need no barrier."""
    block_d = max(16, next_power_of_2(width))
    return LaunchConfig(min(16, max(1, block_d // 512)), 1, {"BLOCK_M": max(1, 1024 // block_d), "BLOCK_D": block_d})


def _config(direction: str, x: torch.Tensor) -> LaunchConfig:
    return tuned(f"residual_layer_norm.{direction}", x, row_config(x.shape[-1]), {"BLOCK_M": (1, 64)})


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [M, D] with unit stride in D; a view where the strides allow it."""
    return unit_stride(x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((0, 0)))


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(LN(x) in `dtype`, mean, rstd) of rows [M, D] with unit stride in D."""
    m, d = x.shape
    weight, bias = dense(weight, bias)
    n = x.new_empty((m, d), dtype=dtype)
    mean, rstd = (x.new_empty((m,), dtype=torch.float32) for _ in range(2))
    config = _config("forward", x)
    launch(
        _layer_norm_fwd_kernel, (cdiv(m, config.blocks["BLOCK_M"]),), config, x, x, x.stride(0), None, 0, None,
        weight, bias, None, n, mean, rstd, m, d, 1.0, 0, 1.0, eps,
    )  # fmt: skip
    return n, mean, rstd


def layer_norm_backward(
    dn: torch.Tensor,
    ds: torch.Tensor,
    s: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: torch.Tensor | None = None,
    dy: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [M, D], partial sums [P, 2, D] of dweight and dbias) of rows; fills `n` (needs `bias`) and `dy` where given."""
    m, d = s.shape
    weight, bias = dense(weight, bias)
    config = _config("backward", s)
    block_m = config.blocks["BLOCK_M"]
    # 8 warps for each of 132 multiprocessors; a function of the shape alone, so the bits repeat
    rows_each = max(1, cdiv(cdiv(m, 1056 // config.num_warps), block_m)) * block_m
    programs = cdiv(m, rows_each)
    dx = s.new_empty((m, d))
    part = s.new_empty((programs, 2, d), dtype=torch.float32)
    launch(
        _layer_norm_bwd_kernel, (programs,), config, s, dn, dn.stride(0), ds, ds.stride(0), s, s.stride(0), mean, rstd,
        weight, bias, seed, dx, dy, n, part, m, d, rows_each, alpha,
        dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    return dx, part


def forward(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    alpha: float,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(s, n) shaped like x, n in `dtype` or that of x, and mean, rstd: float32 [M]."""
    x2, y2 = rows_of(x), rows_of(y)
    weight, bias = dense(weight, bias)
    m, d = x2.shape
    s, n = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty((m,), dtype=torch.float32) for _ in range(2))
    config = _config("forward", x)
    launch(
        _layer_norm_fwd_kernel, (cdiv(m, config.blocks["BLOCK_M"]),), config, x, x2, x2.stride(0), y2, y2.stride(0),
        seed, weight, bias, s, n, mean, rstd, m, d, alpha, dropout_threshold(dropout_p), dropout_scale(dropout_p), eps,
    )  # fmt: skip
    return s, n, mean, rstd


def backward(
    ds: torch.Tensor,
    dn: torch.Tensor,
    s: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    alpha: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dy, (dweight, dbias) [2, D]); dy is empty where it equals dx (alpha = 1, no dropout)."""
    dy = s.new_empty(s.shape if seed is not None or alpha != 1.0 else (0,))
    dx, part = layer_norm_backward(
        rows_of(dn), rows_of(ds), rows_of(s), mean, rstd, weight,
        dy=dy if dy.dim() > 1 else None, seed=seed, alpha=alpha, dropout_p=dropout_p,
    )  # fmt: skip
    return dx.view(s.shape), dy, sum_rows(part, weight.dtype)


def _aot(name: str, kernel: Any, dtype: str, width: int, **constexprs: Any) -> AotConfig:
    return aot_config(
        f"residual_layer_norm.{name} D={width}",
        kernel,
        dtype,
        row_config(width),
        constexprs,
        types=dict.fromkeys(("mean_ptr", "rstd_ptr", "part_ptr"), "*fp32"),
        divisible=("D", "stride_xm", "stride_ym", "stride_dnm", "stride_dsm", "stride_sm"),
        spill_budget=64,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Each kernel at four widths with dropout, and as the feed-forward's LayerNorm."""
    plain = {"y_ptr": None, "seed_ptr": None, "s_ptr": None, "stride_ym": 0}
    for dtype in ("bf16", "fp32"):
        for width in (256, 512, 768, 2048):
            yield _aot("residual_fwd", _layer_norm_fwd_kernel, dtype, width)
            yield _aot("residual_bwd", _layer_norm_bwd_kernel, dtype, width, n_ptr=None, bias_ptr=None)
        yield _aot("layer_norm_fwd", _layer_norm_fwd_kernel, dtype, 512, **plain)
        yield _aot("layer_norm_bwd", _layer_norm_bwd_kernel, dtype, 512, dy_ptr=None, seed_ptr=None)
