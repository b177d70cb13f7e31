"""Matrix products of the inference chain (lcconformer.loop.chain), each with what surrounds it in a layer inside.

    norm_product       out = f(LN(x) W' + b), f none, SiLU or GLU; or of LN(LN'(x)), where LN' ends the previous loop and
                       LN'(x), the input of this loop, is written on the way
    residual_product   out = residual + scale * (a W' + b)
    norm               LN(x), the end of the last loop

The weights are read as nn.Linear has them: K-major rows are what both tensor-core paths take, the half step is a factor of the
epilogue, and the two halves of a GLU are two products that share the rows of x.  So nothing is packed, and weights that are
written in place are the ones that the next call uses.

A program of norm_product normalises BLOCK_M whole rows once and multiplies them with one or more tiles of columns: with one
where rows are few and every multiprocessor should have some, with several where rows alone fill the GPU.  The final LayerNorm
of a loop is left to the next loop, because a program that owns whole rows of a K = ffn_dim product streams all of the weights
through one multiprocessor: at 128 rows, eight programs would read 512 KiB each.

Under programmatic dependent launch (PDL, sm_90 and later) a kernel starts while the previous one drains: it loads its first
weights, then waits.  It lets the next kernel start only after its own wait, so that never more than two are in flight, and the
weights, which no kernel of the chain writes, are all that is read ahead of the wait.
"""

# Triton's language joins tuples with + and knows no unpacking
# ruff: noqa: RUF005

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from lcconformer.architectures import SHARED_MEMORY

from .common import (
    AotConfig,
    LaunchConfig,
    add_bias,
    aot_config,
    arch_of,
    cdiv,
    dense,
    launch,
    nearest_arch,
    next_power_of_2,
    product_precision,
    sigmoid,
    supports_pdl,
)

__all__ = ["FEW", "aot_configs", "max_width", "norm", "norm_product", "residual_product"]

# what changes with T or B: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("M", "splits")

NONE, SILU, GLU = (tl.constexpr(i) for i in range(3))
_EPILOGUES = {"none": NONE, "silu": SILU, "glu": GLU}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until what the previous kernel wrote can be read, then let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _rows_from(ptr, row, stride):
    # the tile's offset in 64 bits; those inside of it then fit in 32, which takes half the registers
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def _weights(w_ptr, stride_wn, stride_wk, cols, k, N, K):
    """W' [BLOCK_K, BLOCK_N] at rows k and columns cols, zeros outside."""
    mask = (k < K)[:, None] & (cols < N)[None, :]
    return tl.load(w_ptr + (k[:, None] * stride_wk + cols[None, :] * stride_wn), mask=mask, other=0.0)


@triton.jit
def _weight_chunks(w_ptr, stride_wn, stride_wk, cols, N, K, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    chunks = ()
    for c in tl.static_range(CHUNKS):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        chunks = chunks + (_weights(w_ptr, stride_wn, stride_wk, cols, k, N, K),)
    return chunks


@triton.jit
def _normalised(
    x, weight_ptr, bias_ptr, K, eps, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """LayerNorm of whole rows, CHUNKS tiles [BLOCK_M, BLOCK_K] float32 with zeros beyond K, rounded to DTYPE."""
    total = tl.sum(x[0], 1)
    for c in tl.static_range(1, CHUNKS):
        total += tl.sum(x[c], 1)
    mean = total / K
    squares = tl.zeros_like(mean)
    centred = ()
    for c in tl.static_range(CHUNKS):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        difference = tl.where((k < K)[None, :], x[c] - mean[:, None], 0.0)
        squares += tl.sum(difference * difference, 1)
        centred = centred + (difference,)
    rstd = tl.rsqrt(squares / K + tl.cast(eps, tl.float32))
    out = ()
    for c in tl.static_range(CHUNKS):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        out = out + ((centred[c] * rstd[:, None] * weight + bias).to(DTYPE),)
    return out


@triton.jit
def _load_rows(x_rows, valid, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """BLOCK_M whole rows of a contiguous [., K] matrix as CHUNKS float32 tiles."""
    i = tl.arange(0, BLOCK_M)[:, None]
    rows = ()
    for c in tl.static_range(CHUNKS):
        k = (c * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        rows = rows + (tl.load(x_rows + (i * K + k), mask=valid[:, None] & (k < K), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _store_rows(out_rows, rows, valid, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    i = tl.arange(0, BLOCK_M)[:, None]
    for c in tl.static_range(CHUNKS):
        k = (c * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        tl.store(out_rows + (i * K + k), rows[c], mask=valid[:, None] & (k < K))


@triton.jit
def _chunks_product(a, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in tl.static_range(CHUNKS):
        acc = tl.dot(a[c], w[c], acc, input_precision=PRECISION)
    return acc


@triton.jit
def _activated(acc, gate, bias_ptr, cols, N, EPILOGUE: tl.constexpr):
    out = add_bias(acc, bias_ptr, cols, N)
    if EPILOGUE == SILU:
        out = out * sigmoid(out)
    if EPILOGUE == GLU:
        # biases of values, then of gates
        if bias_ptr is not None:
            gate = gate + tl.load(bias_ptr + N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        out = out * sigmoid(gate)
    return out


@triton.jit(do_not_specialize=RUNTIME)
def _norm_product_kernel(
    x_ptr, previous_weight_ptr, previous_bias_ptr, entered_ptr, norm_weight_ptr, norm_bias_ptr,
    w_ptr, stride_wn, stride_wk, bias_ptr, out_ptr, M, N, K, splits, eps,
    EPILOGUE: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out [M, N]; x [M, K]; W [N, K], or [2 N, K] with values first for a GLU.  `splits` programs share BLOCK_M rows."""
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    valid = row + i < M
    w_gate = w_ptr + N * stride_wn
    if ONE_TILE:
        cols = split * BLOCK_N + tl.arange(0, BLOCK_N)
        w = _weight_chunks(w_ptr, stride_wn, stride_wk, cols, N, K, BLOCK_K, CHUNKS)
        if EPILOGUE == GLU:
            wg = _weight_chunks(w_gate, stride_wn, stride_wk, cols, N, K, BLOCK_K, CHUNKS)
    wait_for_previous(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = _load_rows(_rows_from(x_ptr, row, K), valid, K, BLOCK_M, BLOCK_K, CHUNKS)
    if previous_weight_ptr is not None:
        entered = _normalised(x, previous_weight_ptr, previous_bias_ptr, K, eps, BLOCK_K, CHUNKS, dtype)
        if split == 0:  # every program of these rows has the same
            _store_rows(_rows_from(entered_ptr, row, K), entered, valid, K, BLOCK_M, BLOCK_K, CHUNKS)
        x = ()
        for c in tl.static_range(CHUNKS):
            x = x + (entered[c].to(tl.float32),)
    a = _normalised(x, norm_weight_ptr, norm_bias_ptr, K, eps, BLOCK_K, CHUNKS, w_ptr.dtype.element_ty)
    out_rows = _rows_from(out_ptr, row, N)
    if ONE_TILE:
        acc = _chunks_product(a, w, BLOCK_M, BLOCK_N, CHUNKS, PRECISION)
        gate = acc
        if EPILOGUE == GLU:
            gate = _chunks_product(a, wg, BLOCK_M, BLOCK_N, CHUNKS, PRECISION)
        out = _activated(acc, gate, bias_ptr, cols, N, EPILOGUE)
        mask = valid[:, None] & (cols < N)[None, :]
        tl.store(out_rows + (i[:, None] * N + cols[None, :]), out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        for col in range(split * BLOCK_N, N, splits * BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            w = _weight_chunks(w_ptr, stride_wn, stride_wk, cols, N, K, BLOCK_K, CHUNKS)
            acc = _chunks_product(a, w, BLOCK_M, BLOCK_N, CHUNKS, PRECISION)
            gate = acc
            if EPILOGUE == GLU:
                w = _weight_chunks(w_gate, stride_wn, stride_wk, cols, N, K, BLOCK_K, CHUNKS)
                gate = _chunks_product(a, w, BLOCK_M, BLOCK_N, CHUNKS, PRECISION)
            out = _activated(acc, gate, bias_ptr, cols, N, EPILOGUE)
            mask = valid[:, None] & (cols < N)[None, :]
            tl.store(out_rows + (i[:, None] * N + cols[None, :]), out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _residual_product_kernel(
    a_ptr, w_ptr, stride_wn, stride_wk, bias_ptr, residual_ptr, out_ptr, M, N, K, scale,
    PRECISION: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = residual + scale * (a W' + b), [M, N]; out may be the residual."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row + i < M
    k = tl.arange(0, BLOCK_K)
    w = _weights(w_ptr, stride_wn, stride_wk, cols, k, N, K)
    wait_for_previous(PDL)
    a_rows = _rows_from(a_ptr, row, K)
    a = tl.load(a_rows + (i[:, None] * K + k[None, :]), mask=valid[:, None] & (k < K)[None, :], other=0.0)
    acc = tl.dot(a, w, input_precision=PRECISION)
    for start in range(BLOCK_K, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows + (i[:, None] * K + k[None, :]), mask=valid[:, None] & (k < K)[None, :], other=0.0)
        w = _weights(w_ptr, stride_wn, stride_wk, cols, k, N, K)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    z = add_bias(acc, bias_ptr, cols, N)
    mask = valid[:, None] & (cols < N)[None, :]
    at = i[:, None] * N + cols[None, :]
    residual = tl.load(_rows_from(residual_ptr, row, N) + at, mask=mask, other=0.0).to(tl.float32)
    out = residual + tl.cast(scale, tl.float32) * z
    tl.store(_rows_from(out_ptr, row, N) + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _norm_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, M, K, eps,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out = LN(x), [M, K]"""
    row = tl.program_id(0) * BLOCK_M
    valid = row + tl.arange(0, BLOCK_M) < M
    wait_for_previous(PDL)
    x = _load_rows(_rows_from(x_ptr, row, K), valid, K, BLOCK_M, BLOCK_K, CHUNKS)
    out = _normalised(x, norm_weight_ptr, norm_bias_ptr, K, eps, BLOCK_K, CHUNKS, out_ptr.dtype.element_ty)
    _store_rows(_rows_from(out_ptr, row, K), out, valid, K, BLOCK_M, BLOCK_K, CHUNKS)


# --- launching -------------------------------------------------------------------------------------------------------

FEW = 512  # rows, up to which a program has one tile of columns
# widths of whole rows that a program can hold without spilling; of more than FEW rows, and there with less shared memory
_WIDEST, _WIDEST_OF_MANY, _WIDEST_OF_MANY_IN_99_KIB = 768, 512, 256
_PROGRAMS = 264  # two for each of 132 multiprocessors


def max_width(arch: int, m: int) -> int:
    """Return the width of the widest of `m` rows that the products serve."""
    if m <= FEW:
        return _WIDEST
    return _WIDEST_OF_MANY if SHARED_MEMORY[nearest_arch(arch)] > 128 * 1024 else _WIDEST_OF_MANY_IN_99_KIB


@functools.cache
def row_chunks(width: int, largest: int = 256) -> tuple[int, int]:
    """Return (BLOCK_K, CHUNKS): whole rows as the fewest tiles with the least beyond them."""
    if width <= 32:
        return max(16, next_power_of_2(width)), 1
    block = min(
        (b for b in (256, 128, 64, 32) if b <= largest), key=lambda b: (cdiv(width, max(b, 64)) * max(b, 64), -b)
    )
    return block, cdiv(width, block)


def norm_product_config(arch: int, dtype: torch.dtype, m: int, k: int, glu: bool) -> LaunchConfig:
    """Choose tiles: what a program holds are the rows, [BLOCK_M, K], and a tile of weights or two, [K, BLOCK_N]."""
    if dtype == torch.float32:
        # without tensor cores every thread holds whole rows of its operands of a product
        block_k, chunks = row_chunks(k, 32)
        return LaunchConfig(4, 2, {"BLOCK_M": 16, "BLOCK_N": 16 if glu else 32, "BLOCK_K": block_k, "CHUNKS": chunks})
    block_k, chunks = row_chunks(k)
    width = block_k * chunks
    blocks = {"BLOCK_K": block_k, "CHUNKS": chunks}
    if m <= FEW:
        warps = 4 if width <= (512 if m <= 128 else 256) else 8
        # 16384 weights of 16 bits are 64 registers a thread of four warps
        weights = 4096 * warps // (2 if glu else 1)
        block_n = min(64, max(16, next_power_of_2(weights // width + 1) // 2))
        block_m = 16 if m <= 128 or width > 512 else 32
        return LaunchConfig(warps, 1, {"BLOCK_M": block_m, "BLOCK_N": block_n, **blocks})
    return LaunchConfig(4 if width <= 256 else 8, 2, {"BLOCK_M": 64, "BLOCK_N": 32, **blocks})


def residual_product_config(arch: int, dtype: torch.dtype, m: int, k: int) -> LaunchConfig:
    if dtype == torch.float32:
        return LaunchConfig(4, 2, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64})
    block_k = min(128, max(16, next_power_of_2(k)))
    if m <= FEW:
        return LaunchConfig(4, 3, {"BLOCK_M": 16 if m <= 128 else 32, "BLOCK_N": 32, "BLOCK_K": block_k})
    return LaunchConfig(4, 3, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": min(64, block_k)})


def norm_config(k: int) -> LaunchConfig:
    block_k, chunks = row_chunks(k)
    return LaunchConfig(4, 1, {"BLOCK_M": 4, "BLOCK_K": block_k, "CHUNKS": chunks})


def norm_product(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    *,
    epilogue: str = "none",
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    entered: torch.Tensor | None = None,
    pdl: bool = True,
) -> None:
    """out [M, N] = f(LN(x) W' + b) of contiguous x [M, K]; f is the epilogue, ``"none"``, ``"silu"`` or ``"glu"``.

    Args:
        norm: weight and bias of the LayerNorm.
        weight: [N, K]; [2 N, K] for a GLU.
        previous: weight and bias of a LayerNorm ahead of `norm`; its output goes to `entered` [M, K].
        pdl: start while the previous kernel drains, on a GPU that can; only after a kernel of the chain.
    """
    (m, k), n, glu = x.shape, out.shape[1], epilogue == "glu"
    config = norm_product_config(arch_of(x), x.dtype, m, k, glu)
    tiles = cdiv(n, config.blocks["BLOCK_N"])
    row_tiles = cdiv(m, config.blocks["BLOCK_M"])
    one_tile = config.num_stages == 1
    splits = tiles if one_tile else min(tiles, cdiv(_PROGRAMS, row_tiles))
    norm_weight, norm_bias, bias = dense(*norm, bias)
    previous_weight, previous_bias = dense(*(previous or (None, None)))
    pdl = pdl and supports_pdl(x)
    launch(
        _norm_product_kernel, (row_tiles * splits,), config.with_pdl(pdl), x,
        x, previous_weight, previous_bias, entered, norm_weight, norm_bias, weight, weight.stride(0), weight.stride(1),
        bias, out, m, n, k, splits, eps,
        EPILOGUE=_EPILOGUES[epilogue], ONE_TILE=one_tile, PRECISION=product_precision(x.dtype), PDL=pdl,
    )  # fmt: skip


def residual_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    out: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """out [M, N] = residual + scale * (a W' + b) of contiguous a [M, K]; `out` may be `residual`."""
    (m, k), n = a.shape, out.shape[1]
    config = residual_product_config(arch_of(a), a.dtype, m, k)
    (bias,) = dense(bias)
    programs = cdiv(m, config.blocks["BLOCK_M"]) * cdiv(n, config.blocks["BLOCK_N"])
    pdl = supports_pdl(a)
    launch(
        _residual_product_kernel, (programs,), config.with_pdl(pdl), a,
        a, weight, weight.stride(0), weight.stride(1), bias, residual, out, m, n, k, scale,
        PRECISION=product_precision(a.dtype), PDL=pdl,
    )  # fmt: skip


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, eps: float) -> None:
    """out = LN(x), contiguous [M, K]."""
    m, k = x.shape
    config = norm_config(k)
    weight, bias = dense(weight, bias)
    pdl = supports_pdl(x)
    launch(
        _norm_kernel,
        (cdiv(m, config.blocks["BLOCK_M"]),),
        config.with_pdl(pdl),
        x,
        x,
        weight,
        bias,
        out,
        m,
        k,
        eps,
        PDL=pdl,
    )


# --- ahead of time ---------------------------------------------------------------------------------------------------

_FLOAT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _aot(
    name: str,
    kernel: Any,
    arch: int,
    dtype: str,
    config: LaunchConfig,
    constexprs: dict[str, Any],
    spill_budget: int = 0,
) -> AotConfig:
    # weights as nn.Linear has them
    weights = {"stride_wk": 1} if "stride_wk" in kernel.arg_names else {}
    return aot_config(
        f"chain_products.{name}",
        kernel,
        dtype,
        config.with_pdl(arch >= 90),
        constexprs | weights,
        divisible=("N", "K", "stride_wn"),
        tensor_cores=dtype != "fp32" and kernel is not _norm_kernel,
        spill_budget=spill_budget,
    )


def _norm_products(arch: int, dtype: str, m: int, k: int, epilogue: str, first: bool) -> AotConfig:
    config = norm_product_config(arch, _FLOAT[dtype], m, k, epilogue == "glu")
    constexprs: dict[str, Any] = {
        "EPILOGUE": _EPILOGUES[epilogue],
        "ONE_TILE": config.num_stages == 1,
        "PRECISION": product_precision(_FLOAT[dtype]),
    }
    if first:
        constexprs |= dict.fromkeys(("previous_weight_ptr", "previous_bias_ptr", "entered_ptr"))
    name = f"norm_product {epilogue}{'' if first else ' of two norms'} K={k} M={m}"
    # the two accumulators of 512 columns leave too few registers on sm_100, by two
    spill_budget = 8 if (arch, epilogue, k, m) == (100, "glu", 512, FEW) else 0
    return _aot(name, _norm_product_kernel, arch, dtype, config, constexprs, spill_budget)


def _residual_products(arch: int, dtype: str, m: int, k: int) -> AotConfig:
    config = residual_product_config(arch, _FLOAT[dtype], m, k)
    constexprs = {"PRECISION": product_precision(_FLOAT[dtype])}
    return _aot(f"residual_product K={k} M={m}", _residual_product_kernel, arch, dtype, config, constexprs)


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Few and many rows of several widths, every epilogue; fp16 and fp32 once."""
    for m in (128, FEW, FEW + 1):
        for epilogue in ("none", "silu"):
            yield _norm_products(arch, "bf16", m, 256, epilogue, True)
        for k in dict.fromkeys((256, min(512, max_width(arch, m)))):
            yield _norm_products(arch, "bf16", m, k, "glu", True)
            yield _norm_products(arch, "bf16", m, k, "silu", False)
        yield _residual_products(arch, "bf16", m, 1024)
    for m, k in ((128, 144), (FEW + 1, 144), (128, _WIDEST)):
        yield _norm_products(arch, "bf16", m, k, "glu", True)
        yield _norm_products(arch, "bf16", m, k, "silu", False)
    for dtype in ("fp16", "fp32"):
        yield _norm_products(arch, dtype, 128, 256, "glu", True)
        yield _norm_products(arch, dtype, 128, 256, "silu", False)
        yield _residual_products(arch, dtype, 128, 1024)
    for k in (256, _WIDEST):
        yield _aot(f"norm K={k}", _norm_kernel, arch, "bf16", norm_config(k), {})
