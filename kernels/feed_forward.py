"""Triton kernels of ``feed_forward`` around cuBLAS, everything between the GEMMs in one pass each; or GEMMs with it inside.

    forward     h = LN(x);  u = h W1';  g = drop(silu(u + b1));  z = g W2';  out = x + scale * drop(z + b2)
    backward    dz, db2;  dg = dz W2;  du, g again, db1;  dh = du W1;  dx, h again, LN gradients;  dW2, dW1

Where tuning found it faster, a product of feed_forward_products.py takes the place of cuBLAS and the steps beside it.

Kept for the backward: x, the row statistics of LN, and u. h and g are recomputed where they are needed, dropout
masks come from counters, and bias gradients are sums of per-program partials in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import feed_forward_products as products
from .common import (
    HIDDEN,
    OUTPUT,
    AotConfig,
    LaunchConfig,
    add_bias,
    aot_config,
    cdiv,
    dense,
    dropout_scale,
    dropout_threshold,
    dropped,
    launch,
    sigmoid,
)
from .feed_forward_products import LIBRARY
from .partials import sum_rows
from .residual_layer_norm import layer_norm, layer_norm_backward, rows_of

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("M", "rows_each", "threshold")

# 16 elements a thread
_CONFIG = LaunchConfig(num_warps=4, num_stages=1, blocks={"BLOCK_M": 16, "BLOCK_N": 128})


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _activation_fwd_kernel(
    u_ptr, bias_ptr, seed_ptr, g_ptr, M, N, threshold, keep_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """g = drop(silu(u + b1)), [M, N]"""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_start = tl.program_id(1) * BLOCK_N
    offs_n = col_start + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (offs_n < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    u = add_bias(tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32), bias_ptr, offs_n, N)
    g = dropped(u * sigmoid(u), seed_ptr, HIDDEN, rows, col_start, threshold, keep_scale, BLOCK_N)
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _activation_bwd_kernel(
    dg_ptr, u_ptr, bias_ptr, seed_ptr, du_ptr, g_ptr, part_ptr, M, N, rows_each, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """du = silu'(u + b1) * drop'(dg), g = drop(silu(u + b1)) again, and part [P, N] of the sum of du."""
    program = tl.program_id(0)
    col_start = tl.program_id(1) * BLOCK_N
    offs_n = col_start + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((program + 1) * rows_each, M)
    for start in range(program * rows_each, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (offs_n < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
        u = add_bias(tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32), bias_ptr, offs_n, N)
        dg = tl.load(dg_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # dropout is linear: one factor serves g and its gradient
        factor = dropped(tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32), seed_ptr, HIDDEN, rows, col_start, threshold,
                       keep_scale, BLOCK_N)  # fmt: skip
        s = sigmoid(u)
        du = dg * factor * s * (1.0 + u * (1.0 - s))
        acc += du
        tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.store(g_ptr + at, (u * s * factor).to(g_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + program.to(tl.int64) * N + offs_n, tl.sum(acc, 0), mask=offs_n < N)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _residual_fwd_kernel(
    z_ptr, bias_ptr, x_ptr, stride_xm, seed_ptr, out_ptr, M, N, scale, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = x + scale * drop(z + b2), [M, N]"""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_start = tl.program_id(1) * BLOCK_N
    offs_n = col_start + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (offs_n < N)[None, :]
    wide = rows.to(tl.int64)[:, None]
    z = add_bias(tl.load(z_ptr + wide * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32), bias_ptr, offs_n, N)
    z = dropped(z, seed_ptr, OUTPUT, rows, col_start, threshold, keep_scale, BLOCK_N)
    x = tl.load(x_ptr + wide * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    out = x + tl.cast(scale, tl.float32) * z
    tl.store(out_ptr + wide * N + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _residual_bwd_kernel(
    dout_ptr, stride_dm, seed_ptr, dz_ptr, part_ptr, M, N, rows_each, scale, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = scale * drop'(dout), and part [P, N] of its sum"""
    program = tl.program_id(0)
    col_start = tl.program_id(1) * BLOCK_N
    offs_n = col_start + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((program + 1) * rows_each, M)
    for start in range(program * rows_each, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (offs_n < N)[None, :]
        wide = rows.to(tl.int64)[:, None]
        dz = tl.load(dout_ptr + wide * stride_dm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dz = dropped(dz * tl.cast(scale, tl.float32), seed_ptr, OUTPUT, rows, col_start, threshold, keep_scale, BLOCK_N)
        acc += dz
        tl.store(dz_ptr + wide * N + offs_n[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + program.to(tl.int64) * N + offs_n, tl.sum(acc, 0), mask=offs_n < N)


def _rows_each(m: int) -> int:
    """Return the rows of each program of a backward kernel: at most 128 partial sums, whatever the device."""
    block_m = _CONFIG.blocks["BLOCK_M"]
    return max(1, cdiv(cdiv(m, 128), block_m)) * block_m


def _grid(rows: int, n: int) -> tuple[int, int]:
    return rows, cdiv(n, _CONFIG.blocks["BLOCK_N"])


def activation(
    u: torch.Tensor, b1: torch.Tensor | None, seed: torch.Tensor | None, dropout_p: float, *, overwrite: bool = False
) -> torch.Tensor:
    """g = drop(silu(u + b1)) of contiguous rows [M, F]; in the memory of u if `overwrite`."""
    (b1,) = dense(b1)
    m, f = u.shape
    drop = (dropout_threshold(dropout_p), dropout_scale(dropout_p))
    g = u if overwrite else torch.empty_like(u)
    launch(
        _activation_fwd_kernel, _grid(cdiv(m, _CONFIG.blocks["BLOCK_M"]), f), _CONFIG, u, u, b1, seed, g, m, f, *drop
    )
    return g


def activation_backward(
    dg: torch.Tensor,
    u: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    g: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(du in the memory of dg, g again [M, F], partial sums [P, F] of db1) of contiguous rows; g where given."""
    (b1,) = dense(b1)
    m, f = u.shape
    drop = (dropout_threshold(dropout_p), dropout_scale(dropout_p))
    each = _rows_each(m)
    programs = cdiv(m, each)
    g = torch.empty_like(u) if g is None else g
    part = u.new_empty((programs, f), dtype=torch.float32)
    launch(_activation_bwd_kernel, _grid(programs, f), _CONFIG, u, dg, u, b1, seed, dg, g, part, m, f, each, *drop)
    return dg, g, part


def up(
    h: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    *,
    save: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(u = h W1' or None unless `save`, g = drop(silu(u + b1))), [M, F], of rows h [M, D] in the dtype of w1."""
    config = products.choice("up", h, w1, w1.shape[0])
    if config != LIBRARY:
        g, u, *_ = products.up(h, None, w1, b1, seed, dropout_p, config, save=save)
        return u, g
    u = torch.mm(h, w1.t())
    return u if save else None, activation(u, b1, seed, dropout_p, overwrite=not save)


def up_backward(
    dz: torch.Tensor,
    w2: torch.Tensor,
    u: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    du: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(du, g again [M, F], partial sums [P, F] of db1) from the gradient dz [M, D] of z = g W2'; du and g where given."""
    config = products.choice("up_backward", dz, w2, w2.shape[1])
    if config != LIBRARY:
        return products.up_backward(dz, w2, u, b1, seed, dropout_p, config, du, g)
    return activation_backward(torch.mm(dz, w2, out=du), u, b1, seed, dropout_p, g)


def _down(
    g: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """x + scale * drop(g W2' + b2), [M, D]"""
    config = products.choice("down", g, w2, w2.shape[0])
    if config != LIBRARY:
        return products.down(g, w2, b2, x, seed, scale, dropout_p, config)
    m, d = x.shape
    (b2,) = dense(b2)
    z = torch.mm(g, w2.t())
    out = x.new_empty((m, d))
    launch(
        _residual_fwd_kernel, _grid(cdiv(m, _CONFIG.blocks["BLOCK_M"]), d), _CONFIG, x, z, b2, x, x.stride(0), seed, out,
        m, d, scale, dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    return out


def forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out like x, mean [M], rstd [M] float32, u [M, F] = LN(x) W1' like w1); the last three empty unless `save`."""
    rows = rows_of(x)
    config = products.choice("norm_up", rows, w1, w1.shape[0])
    mean: torch.Tensor | None
    rstd: torch.Tensor | None
    if config != LIBRARY:
        norm = (norm_weight, norm_bias, eps)
        g, u, mean, rstd = products.up(rows, norm, w1, b1, seed, dropout_p, config, save=save)
    else:
        h, mean, rstd = layer_norm(rows, norm_weight, norm_bias, eps, w1.dtype)
        u, g = up(h, w1, b1, seed, dropout_p, save=save)
    out = _down(g, w2, b2, rows, seed, scale, dropout_p).view(x.shape)
    if u is None or mean is None or rstd is None:
        nothing = x.new_empty((0,), dtype=torch.float32)
        return out, nothing, torch.empty_like(nothing), w1.new_empty((0,))
    return out, mean, rstd, u


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    u: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, (dnorm_weight, dnorm_bias) [2, D], dw1, db1, dw2, db2)"""
    x2, dout2 = rows_of(x), rows_of(dout)
    m, d = x2.shape
    each = _rows_each(m)
    programs = cdiv(m, each)

    dz = x.new_empty((m, d), dtype=w2.dtype)
    part = x.new_empty((programs, d), dtype=torch.float32)
    launch(
        _residual_bwd_kernel, _grid(programs, d), _CONFIG, x, dout2, dout2.stride(0), seed, dz, part, m, d, each,
        scale, dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    db2 = sum_rows(part, w2.dtype)

    du, g, part = up_backward(dz, w2, u, b1, seed, dropout_p)
    db1 = sum_rows(part, w1.dtype)
    dw2 = torch.mm(dz.t(), g)

    dh = torch.mm(du, w1)
    h = torch.empty_like(dh)
    dx, part = layer_norm_backward(dh, dout2, x2, mean, rstd, norm_weight, norm_bias, n=h)
    dnorm = sum_rows(part, norm_weight.dtype)
    dw1 = torch.mm(du.t(), h)
    return dx.view(x.shape), dnorm, dw1, db1, dw2, db2


def _aot(name: str, kernel: Any, dtype: str, dropout: bool) -> AotConfig:
    return aot_config(
        f"feed_forward.{name}{' dropout' if dropout else ''}",
        kernel,
        dtype,
        _CONFIG,
        {} if dropout else {"seed_ptr": None},
        types={"part_ptr": "*fp32"},
        divisible=("N", "stride_xm", "stride_dm"),
        spill_budget=64,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Yield every kernel, with and without dropout."""
    kernels = {
        "activation_fwd": _activation_fwd_kernel,
        "activation_bwd": _activation_bwd_kernel,
        "residual_fwd": _residual_fwd_kernel,
        "residual_bwd": _residual_bwd_kernel,
    }
    for dtype in ("bf16", "fp32"):
        for name, kernel in kernels.items():
            for dropout in (False, True):
                yield _aot(name, kernel, dtype, dropout)
