"""The depthwise convolution of the inference chain (lcconformer.loop.chain): norm and SiLU inside, the GLU already done.

    taps        float32 [K up to a multiple of TAPS, + 1, C] of a layer: its taps transposed, an evaluated BatchNorm folded in,
                zeros up to the last row, which is the bias; once a call, so that weights may be written in place
    depthwise   silu(norm(conv(x)))

A program of `depthwise` has all channels of its frames where a LayerNorm follows; its rows of lanes are one per warp, so that
the sums over channels stay inside a warp.  It slides over the input frames with BLOCK_R outputs in registers.
"""

# Triton's language joins tuples with + and knows no unpacking
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .chain_products import wait_for_previous
from .common import AotConfig, LaunchConfig, aot_config, cdiv, launch, next_power_of_2, sigmoid, supports_pdl

__all__ = ["aot_configs", "depthwise", "tap_rows", "taps"]

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("T", "K", "tiles")

TAPS = 4  # a step along the taps
FEW_FRAMES = 2048  # up to which a program has two frames a row of lanes, so that there are more programs


@triton.jit(do_not_specialize=RUNTIME)
def _taps_kernel(
    weight_ptr, stride_wc, stride_wk, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, out_ptr, C, K, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of out [*, C]: a tap, or zeros, or in the last program the bias."""
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    inside = mask & (c * 0 + k < K)
    tap = tl.load(weight_ptr + (c * stride_wc + k * stride_wk), mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        var = tl.load(var_ptr + c, mask=mask, other=1.0).to(tl.float32)
        scale = tl.load(norm_weight_ptr + c, mask=mask, other=0.0).to(tl.float32) / tl.sqrt_rn(
            var + tl.cast(eps, tl.float32)
        )
        tap = tap * scale
        bias = (bias - tl.load(mean_ptr + c, mask=mask, other=0.0).to(tl.float32)) * scale
        bias += tl.load(norm_bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (k * C + c), tl.where(k == tl.num_programs(0) - 1, bias, tap), mask=mask)


@triton.jit
def _frames(x_rows, t, n, C, c, mask_c):
    """Frames t of x [*, C] as float32 [BLOCK_S, BLOCK_C], zeros outside of 0 ... n-1."""
    # one unsigned comparison for 0 <= t < n
    inside = t.to(tl.uint32, bitcast=True) < tl.cast(n, tl.uint32)
    return tl.load(x_rows + (t[:, None] * C + c[None, :]), mask=inside[:, None] & mask_c[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=RUNTIME)
def _depthwise_kernel(
    x_ptr, taps_ptr, norm_weight_ptr, norm_bias_ptr, lengths_ptr, out_ptr, T, C, K, tiles, eps,
    PDL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_S * BLOCK_R frames of one utterance and BLOCK_C channels; x and out [B, T, C]."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * (BLOCK_S * BLOCK_R) + tl.arange(0, BLOCK_S) * BLOCK_R
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    n = T
    if lengths_ptr is not None:
        n = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32)
    end = tl.cdiv(K, TAPS) * TAPS
    bias = tl.load(taps_ptr + (end * C + c), mask=mask_c, other=0.0)
    wait_for_previous(PDL)
    x_rows = x_ptr + b * T * C
    first = t - K // 2
    acc = ()
    window = ()  # frames first + k ... first + k + BLOCK_R - 2
    for _ in tl.static_range(BLOCK_R):
        acc = acc + (tl.zeros((BLOCK_S, BLOCK_C), tl.float32) + bias[None, :],)
    for r in tl.static_range(BLOCK_R - 1):
        window = window + (_frames(x_rows, first + r, n, C, c, mask_c),)
    for k in range(0, end, TAPS):
        frames = window
        for j in tl.static_range(TAPS):
            frames = frames + (_frames(x_rows, first + k + (BLOCK_R - 1 + j), n, C, c, mask_c),)
        for j in tl.static_range(TAPS):
            tap = tl.load(taps_ptr + ((k + j) * C + c), mask=mask_c, other=0.0)[None, :]
            summed = ()
            for r in tl.static_range(BLOCK_R):
                summed = summed + (acc[r] + frames[r + j] * tap,)
            acc = summed
        window = frames[TAPS:]

    out_rows = out_ptr + b * T * C
    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(norm_bias_ptr + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for r in tl.static_range(BLOCK_R):
        y = acc[r]
        if norm_weight_ptr is not None:
            # taps and bias are zero beyond C
            mean = tl.sum(y, 1) / C
            centred = tl.where(mask_c[None, :], y - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + tl.cast(eps, tl.float32))
            y = centred * rstd[:, None] * weight + shift
        mask = (t + r < T)[:, None] & mask_c[None, :]
        at = (t + r)[:, None] * C + c[None, :]
        tl.store(out_rows + at, (y * sigmoid(y)).to(out_ptr.dtype.element_ty), mask=mask)


def tap_rows(kernel_size: int) -> int:
    """Return the number of rows of a layer's taps."""
    return cdiv(kernel_size, TAPS) * TAPS + 1


def taps(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch_norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Fill out [tap_rows(K), C] float32 from an nn.Conv1d's weight [C, 1, K] and bias.

    Args:
        batch_norm: weight, bias, running mean and variance [C] of a BatchNorm in evaluation.
    """
    c, _, k = weight.shape
    config = LaunchConfig(4, 1, {"BLOCK_C": min(256, max(16, next_power_of_2(c)))})
    vectors = [None if v is None else v.contiguous() for v in (bias, *(batch_norm or (None,) * 4))]
    grid = (len(out), cdiv(c, config.blocks["BLOCK_C"]))
    launch(_taps_kernel, grid, config, out, weight, weight.stride(0), weight.stride(2), *vectors, out, c, k, eps)


def depthwise_config(b: int, t: int, channels: int, layer_norm: bool) -> LaunchConfig:
    """Choose tiles: one row of lanes per warp; more frames in registers where there are enough programs."""
    block_c = max(16, next_power_of_2(channels))
    if not layer_norm:
        block_c = min(256, block_c)
    block_r = 2 if b * t <= FEW_FRAMES else (8 if block_c <= 256 else 4)
    if block_c > 512:
        block_r = 2
    return LaunchConfig(4, 1, {"BLOCK_S": 4, "BLOCK_R": block_r, "BLOCK_C": block_c, "TAPS": TAPS})


def depthwise(
    x: torch.Tensor,
    taps: torch.Tensor,
    kernel_size: int,
    lengths: torch.Tensor | None,
    norm: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """out [B, T, C] = silu(norm(conv(x))) of contiguous x.

    Args:
        taps: [tap_rows(kernel_size), C], of :func:`taps`.
        lengths: [B], frames that are not padding; the others count as zeros.
        norm: weight and bias of a LayerNorm; None: no norm, or one that is in the taps.
    """
    b, t, c = x.shape
    config = depthwise_config(b, t, c, norm is not None)
    tiles = cdiv(t, config.blocks["BLOCK_S"] * config.blocks["BLOCK_R"])
    weight, bias = (None, None) if norm is None else (v.contiguous() for v in norm)
    lengths = None if lengths is None else lengths.contiguous()
    grid = (b * tiles, cdiv(c, config.blocks["BLOCK_C"]))
    pdl = supports_pdl(x)
    launch(
        _depthwise_kernel, grid, config.with_pdl(pdl), x,
        x, taps, weight, bias, lengths, out, t, c, kernel_size, tiles, eps, PDL=pdl,
    )  # fmt: skip


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _aot(name: str, kernel: Any, arch: int, dtype: str, config: LaunchConfig, absent: tuple[str, ...]) -> AotConfig:
    depthwise = kernel is _depthwise_kernel
    return aot_config(
        f"chain_convolution.{name}",
        kernel,
        dtype,
        config.with_pdl(depthwise and arch >= 90),
        dict.fromkeys(absent),
        types={"taps_ptr" if depthwise else "out_ptr": "*fp32"},
        divisible=("C",),
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Few and many frames of several widths, with a LayerNorm and without; fp16 and fp32 once."""
    norm = ("norm_weight_ptr", "norm_bias_ptr")
    for frames in (128, 12800):
        for channels in (256, 512, 768):
            config = depthwise_config(1, frames, channels, True)
            yield _aot(f"depthwise layer C={channels} M={frames}", _depthwise_kernel, arch, "bf16", config, ())
        config = depthwise_config(1, frames, 256, False)
        yield _aot(f"depthwise none C=256 M={frames}", _depthwise_kernel, arch, "bf16", config, norm)
    for dtype in ("fp16", "fp32"):
        config = depthwise_config(1, 128, 256, True)
        yield _aot("depthwise layer C=256 M=128", _depthwise_kernel, arch, dtype, config, ())
    launched = LaunchConfig(4, 1, {"BLOCK_C": 256})
    yield _aot("taps batch", _taps_kernel, arch, "bf16", launched, ())
    yield _aot("taps none", _taps_kernel, arch, "bf16", launched, (*norm, "mean_ptr", "var_ptr"))
