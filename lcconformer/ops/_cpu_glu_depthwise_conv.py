"""glu_depthwise_conv on the CPU kernels; arguments and results as those of lcconformer.kernels.glu_depthwise_conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._cpu import common, cpu_kernels, f32, i64, pointer, unit_stride

__all__ = ["backward", "forward"]


def _norm(norm: str, training: bool) -> str:
    """Name of the norm in ``cpu.Norm``: a BatchNorm has statistics that are running, or those of the batch."""
    return "running" if norm == "batch" and not training else norm


def _inputs(x, taps, lengths, norm, norm_weight, norm_bias, num_groups, eps) -> dict[str, Any]:
    """Arguments that forward and backward share."""
    b, t, _ = x.shape
    k, c = taps.shape
    return {
        **common(x),
        "batch": b,
        "frames": t,
        "channels": c,
        "width": k,
        "x": pointer(x),
        "x_batch_stride": x.stride(0),
        "x_frame_stride": x.stride(1),
        "taps": pointer(taps),
        "lengths": pointer(lengths),
        "norm": getattr(cpu_kernels().Norm, norm),
        "groups": num_groups,
        "norm_weight": pointer(norm_weight),
        "norm_bias": pointer(norm_bias),
        "eps": eps,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, y [B, T, C], mean, var, count): y is the convolution before the norm, kept if ``save``.

    mean, var: float32 ``[C]`` (batch) or ``[B, G]`` (group); count: float32 ``[1]``, real frames of the batch.
    """
    b, t, _ = x.shape
    c = weight.shape[0]
    kind = _norm(norm, training)
    x, taps, lengths = unit_stride(x), f32(weight.t()), i64(lengths)
    bias, norm_weight, norm_bias = f32(bias), f32(norm_weight), f32(norm_bias)
    out = x.new_empty((b, t, c))
    y = x.new_empty((b, t, c) if save or kind in ("batch", "group") else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if kind == "batch":
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
    elif kind == "group":
        mean, var = (x.new_empty((b, num_groups), dtype=torch.float32) for _ in range(2))
    elif running_mean is not None and running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (running_mean, running_var))
    cpu = cpu_kernels()
    args = cpu.GluDepthwiseConvForward(
        **_inputs(x, taps, lengths, kind, norm_weight, norm_bias, num_groups, eps),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        bias=pointer(bias),
        out=pointer(out),
        y=pointer(y) if y.dim() == 3 else 0,
    )
    cpu.glu_depthwise_conv_forward(args)
    if kind == "running" and not save:
        mean, var = (x.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return out, y, mean, var, count


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [B, T, 2C], dweight [K, C] (transposed), dbias [C], (dnorm_bias, dnorm_weight) [2, C] or empty)."""
    c, k = weight.shape
    kind = _norm(norm, training)
    x, dout, taps, lengths = unit_stride(x), unit_stride(dout), f32(weight.t()), i64(lengths)
    scale, shift = f32(norm_weight), f32(norm_bias)
    dx = x.new_empty(x.shape)
    dtaps, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in ((k, c), (c,)))
    dnorm = x.new_empty((0,) if norm_weight is None else (2, c), dtype=torch.float32)
    cpu = cpu_kernels()
    args = cpu.GluDepthwiseConvBackward(
        **_inputs(x, taps, lengths, kind, scale, shift, num_groups, eps),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        y=pointer(y),
        dout=pointer(dout),
        dout_batch_stride=dout.stride(0),
        dout_frame_stride=dout.stride(1),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dnorm=pointer(dnorm),
    )
    cpu.glu_depthwise_conv_backward(args)
    dnorm = dnorm.to(x.dtype if norm_weight is None else norm_weight.dtype)
    return dx, dtaps.to(weight.dtype), dbias.to(weight.dtype), dnorm
