"""Matrix products of ``feed_forward`` with the steps around them inside: LayerNorm, bias, SiLU, dropout, residual.

    up            u = h W1',  g = drop(silu(u + b1));  h is given, or LN(x) formed from x on the way into the product
    down          out = x + scale * drop(g W2' + b2)
    up_backward   dg = dz W2;  du = silu'(u + b1) * drop'(dg), g again, partial sums of du

What they save against cuBLAS between pointwise kernels is a round trip of [M, F] (up, up_backward) or [M, D] (down, and the
LayerNorm) through memory, and launches; what cuBLAS has is the faster product. Which one pays depends on the shape and the
GPU, and no GPU has measured it yet: the library's product is the default, `python -m lcconformer tune` tries these. Dropout
draws the same masks here as in the pointwise kernels, so a forward by one and a backward by the other belong together.

By what the compiler says (sm_90, bf16, 128 x 128 x 64, 8 warps): a step along K issues 118 instructions a warp, 4 of them
HGMMA, where the tensor cores need 512 cycles for the tile and the schedulers 236. With LayerNorm inside it is 358, and 314
more where the statistics are gathered: then the schedulers are the bottleneck, 2.6 times over, and a LayerNorm of its own
is cheaper unless there are so few rows that launches are all that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

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
    next_power_of_2,
    sigmoid,
)
from .tuning import tuned

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("M", "threshold")


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile: its first row and column, and its rows and columns that exist, [BLOCK_M] and [BLOCK_N].

    Columns are innermost: the programs that run side by side share their rows, and all of the weights stay in L2.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M
    col = tl.program_id(0) % tiles * BLOCK_N
    return row, col, row + tl.arange(0, BLOCK_M) < M, col + tl.arange(0, BLOCK_N) < N


@triton.jit
def _rows_from(ptr, row, stride):
    # the tile's offset in 64 bits; those inside of it then fit in 32, which takes half the registers
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def _statistics(x_rows, stride_xm, valid, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean, rstd) of rows of x, [BLOCK_M] each, in one pass: chunks of BLOCK_K columns, merged as Chan et al. (1979) do."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    i = tl.arange(0, BLOCK_M)[:, None]
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (k < K)[None, :]
        x = tl.load(x_rows + (i * stride_xm + k[None, :]), mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(K - start, BLOCK_K).to(tl.float32)
        chunk = tl.sum(x, 1) / count
        centred = tl.where(mask, x - chunk[:, None], 0.0)
        delta = chunk - mean
        share = count / (start + count)
        squares += tl.sum(centred * centred, 1) + delta * delta * (start * share)
        mean += delta * share
    return mean, tl.rsqrt(squares / K + tl.cast(eps, tl.float32))


@triton.jit
def _product(
    a_rows, stride_am, valid, b_ptr, stride_bk, stride_bn, col, N, K, mean, rstd, norm_weight_ptr, norm_bias_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] float32 of a [., K] b [K, N], or of LN(a) b with the statistics [BLOCK_M] of the rows of a."""
    i = tl.arange(0, BLOCK_M)[:, None]
    cols = (col + tl.arange(0, BLOCK_N))[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows + (i * stride_am + k[None, :]), mask=valid[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + (k[:, None] * stride_bk + cols * stride_bn), mask=(k < K)[:, None] & (cols < N), other=0.0)
        if norm_weight_ptr is not None:
            weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            a = (a.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias
        acc = tl.dot(a.to(b.dtype), b, acc)
    return acc


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _up_kernel(
    x_ptr, stride_xm, norm_weight_ptr, norm_bias_ptr, w_ptr, stride_wk, stride_wn, bias_ptr, seed_ptr,
    u_ptr, g_ptr, mean_ptr, rstd_ptr, M, N, K, eps, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g = drop(silu(u + b1)), u = x W1' or LN(x) W1', [M, N]; u, mean and rstd are left out where their pointer is None."""
    row, col, valid, valid_n = _tile(M, N, BLOCK_M, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    x_rows = _rows_from(x_ptr, row, stride_xm)
    if norm_weight_ptr is None:
        mean = None
        rstd = None
    else:
        mean, rstd = _statistics(x_rows, stride_xm, valid, K, eps, BLOCK_M, BLOCK_K)
        if mean_ptr is not None:  # noqa: SIM102 (the first is known when compiled)
            if col == 0:  # every program of these rows has the same statistics
                tl.store(mean_ptr + row + i, mean, mask=valid)
                tl.store(rstd_ptr + row + i, rstd, mask=valid)
    acc = _product(
        x_rows, stride_xm, valid, w_ptr, stride_wk, stride_wn, col, N, K, mean, rstd, norm_weight_ptr, norm_bias_ptr,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = i[:, None] * N + cols[None, :]
    mask = valid[:, None] & valid_n[None, :]
    # g is that of u as stored, which is what the backward has
    u = acc.to(g_ptr.dtype.element_ty)
    if u_ptr is not None:
        tl.store(_rows_from(u_ptr, row, N) + at, u, mask=mask)
    u = add_bias(u.to(tl.float32), bias_ptr, cols, N)
    g = dropped(u * sigmoid(u), seed_ptr, HIDDEN, row + i, col, threshold, keep_scale, BLOCK_N)
    tl.store(_rows_from(g_ptr, row, N) + at, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _down_kernel(
    g_ptr, w_ptr, stride_wk, stride_wn, bias_ptr, x_ptr, stride_xm, seed_ptr, out_ptr, M, N, K, scale, threshold,
    keep_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x + scale * drop(g W2' + b2), [M, N]"""
    row, col, valid, valid_n = _tile(M, N, BLOCK_M, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    z = _product(
        _rows_from(g_ptr, row, K), K, valid, w_ptr, stride_wk, stride_wn, col, N, K, None, None, None, None,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    z = add_bias(z, bias_ptr, cols, N)
    z = dropped(z, seed_ptr, OUTPUT, row + i, col, threshold, keep_scale, BLOCK_N)
    mask = valid[:, None] & valid_n[None, :]
    x_at = _rows_from(x_ptr, row, stride_xm) + (i[:, None] * stride_xm + cols[None, :])
    out = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + tl.cast(scale, tl.float32) * z
    out_at = _rows_from(out_ptr, row, N) + (i[:, None] * N + cols[None, :])
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=("seed_ptr",))
def _up_bwd_kernel(
    dz_ptr, stride_dm, w_ptr, stride_wk, stride_wn, u_ptr, bias_ptr, seed_ptr, du_ptr, g_ptr, part_ptr, M, N, K, threshold,
    keep_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du = silu'(u + b1) * drop'(dz W2), g = drop(silu(u + b1)) again, [M, N], and part [M / BLOCK_M, N] of the sum of du."""
    row, col, valid, valid_n = _tile(M, N, BLOCK_M, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    dg = _product(
        _rows_from(dz_ptr, row, stride_dm), stride_dm, valid, w_ptr, stride_wk, stride_wn, col, N, K,
        None, None, None, None, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = i[:, None] * N + cols[None, :]
    mask = valid[:, None] & valid_n[None, :]
    u = tl.load(_rows_from(u_ptr, row, N) + at, mask=mask, other=0.0)
    u = add_bias(u.to(tl.float32), bias_ptr, cols, N)
    s = sigmoid(u)
    # dropout is linear: one factor serves g and its gradient
    factor = dropped(tl.full(dg.shape, 1.0, tl.float32), seed_ptr, HIDDEN, row + i, col, threshold, keep_scale, BLOCK_N)
    du = dg * factor * s * (1.0 + u * (1.0 - s))
    tl.store(_rows_from(du_ptr, row, N) + at, du.to(du_ptr.dtype.element_ty), mask=mask)
    tl.store(_rows_from(g_ptr, row, N) + at, (u * s * factor).to(g_ptr.dtype.element_ty), mask=mask)
    # rows beyond M have dg = 0
    tl.store(_rows_from(part_ptr, row // BLOCK_M, N) + cols, tl.sum(du, 0), mask=valid_n)


# no kernel of this file: cuBLAS between pointwise kernels
LIBRARY = LaunchConfig(0, 0)


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> LaunchConfig:
    return LaunchConfig(warps, stages, {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k})


# from many rows to few. up_backward holds u, its sigmoid and two masks beside the product: with 128 x 128 it spills 552 B
# (sm_90, bf16, dropout)
_SMALL = (_config(128, 64, 64, 8, 3), _config(64, 64, 64, 4, 4), _config(64, 32, 128, 4, 3))
CONFIGS = {
    "norm_up": (_config(128, 128, 64, 8, 3), *_SMALL),
    "up": (_config(128, 128, 64, 8, 3), *_SMALL),
    "down": (_config(128, 128, 64, 8, 3), *_SMALL),
    "up_backward": _SMALL,
}


def choice(product: str, x: torch.Tensor, weight: torch.Tensor, n: int) -> LaunchConfig:
    """How to form a product of the rows x [M, K] with `n` columns of `weight`: LIBRARY, or as tuned for this shape."""
    if weight.dtype == torch.float32:
        return LIBRARY
    m, k = x.shape
    # lengths differ from batch to batch: one choice up to each power of two
    shape = f"M<={next_power_of_2(m)} N={n} K={k}"
    return tuned(f"feed_forward.{product}", x, LIBRARY, CONFIGS[product], shape)


def _grid(m: int, n: int, config: LaunchConfig) -> tuple[int]:
    return (cdiv(m, config.blocks["BLOCK_M"]) * cdiv(n, config.blocks["BLOCK_N"]),)


def up(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    config: LaunchConfig,
    *,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(g, u [M, F], mean, rstd [M]) of rows x [M, D]; the last two with `norm` (weight, bias, eps), all but g if `save`."""
    (m, d), f = x.shape, w1.shape[0]
    weight, bias, eps = norm or (None, None, 0.0)
    weight, bias, b1 = dense(weight, bias, b1)
    g = x.new_empty((m, f), dtype=w1.dtype)
    u = torch.empty_like(g) if save else None
    mean, rstd = (x.new_empty((m,), dtype=torch.float32) if save and norm else None for _ in range(2))
    launch(
        _up_kernel, _grid(m, f, config), config, x, x, x.stride(0), weight, bias, w1, w1.stride(1), w1.stride(0), b1, seed,
        u, g, mean, rstd, m, f, d, eps, dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    return g, u, mean, rstd


def down(
    g: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    config: LaunchConfig,
) -> torch.Tensor:
    """x + scale * drop(g W2' + b2), [M, D], of contiguous g [M, F]."""
    m, d = x.shape
    (b2,) = dense(b2)
    out = x.new_empty((m, d))
    launch(
        _down_kernel, _grid(m, d, config), config, x, g, w2, w2.stride(1), w2.stride(0), b2, x, x.stride(0), seed, out,
        m, d, g.shape[1], scale, dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    return out


def up_backward(
    dz: torch.Tensor,
    w2: torch.Tensor,
    u: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    config: LaunchConfig,
    du: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(du, g again [M, F], partial sums [P, F] of db1) of rows dz [M, D] and contiguous u; du and g where given."""
    (b1,) = dense(b1)
    m, f = u.shape
    du, g = (torch.empty_like(u) if out is None else out for out in (du, g))
    part = u.new_empty((cdiv(m, config.blocks["BLOCK_M"]), f), dtype=torch.float32)
    launch(
        _up_bwd_kernel, _grid(m, f, config), config, u, dz, dz.stride(0), w2, w2.stride(0), w2.stride(1), u, b1, seed,
        du, g, part, m, f, dz.shape[1], dropout_threshold(dropout_p), dropout_scale(dropout_p),
    )  # fmt: skip
    return du, g, part


def _aot(product: str, dtype: str, config: LaunchConfig, dropout: bool) -> AotConfig:
    # the weights as nn.Linear has them
    constexprs: dict[str, Any] = {"stride_wn" if product == "up_backward" else "stride_wk": 1}
    constexprs |= {} if dropout else {"seed_ptr": None}
    if product == "up":
        constexprs |= dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr", "mean_ptr", "rstd_ptr"))
    sizes = "x".join(map(str, config.blocks.values()))
    return aot_config(
        f"feed_forward_products.{product} {sizes}{' dropout' if dropout else ''}",
        {"down": _down_kernel, "up_backward": _up_bwd_kernel}.get(product, _up_kernel),
        dtype,
        config,
        constexprs,
        types=dict.fromkeys(("mean_ptr", "rstd_ptr", "part_ptr"), "*fp32"),
        divisible=("N", "K", "stride_xm", "stride_dm", "stride_wk", "stride_wn"),
        tensor_cores=True,
        spill_budget=64,
        may_serialize=product == "norm_up" and config.blocks["BLOCK_N"] == 32,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every tile of every product, with and without dropout; fp16 once."""
    for product, configs in CONFIGS.items():
        for config in configs:
            yield _aot(product, "bf16", config, False)
            yield _aot(product, "bf16", config, True)
        yield _aot(product, "fp16", configs[0], False)
