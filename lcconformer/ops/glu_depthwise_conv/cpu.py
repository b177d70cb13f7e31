"""glu_depthwise_conv on the CPU kernels of csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..availability import cpu_reasons
from ..native import common, cpu_kernels, f32, i64, pointer, unit_stride
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = ["backward", "forward", "unsupported"]


def unsupported(traits: Traits) -> list[str]:
    return cpu_reasons(traits.device, traits.dtype)


def _norm(norm: str, training: bool) -> str:
    """Name of the norm in ``cpu.Norm``: a BatchNorm has statistics that are running, or those of the batch."""
    return "running" if norm == "batch" and not training else norm


def _inputs(x, taps, lengths, norm, norm_weight, norm_bias, num_groups, eps, activation) -> dict[str, Any]:
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
        "activation": getattr(cpu_kernels().Activation, activation),
    }


def forward(args: GluDepthwiseConv, save: bool, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
    b, t, _ = args.x.shape
    c, groups = args.weight.shape[0], args.num_groups
    kind = _norm(args.norm, args.training)
    x, taps, lengths = unit_stride(args.x), f32(args.weight.t()), i64(args.lengths)
    bias, norm_weight, norm_bias = f32(args.bias), f32(args.norm_weight), f32(args.norm_bias)
    out = x.new_empty((b, t, c)) if out is None else out
    y = x.new_empty((b, t, c) if save or kind in ("batch", "group") else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if kind == "batch":
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
    elif kind == "group":
        mean, var = (x.new_empty((b, groups), dtype=torch.float32) for _ in range(2))
    elif args.running_mean is not None and args.running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (args.running_mean, args.running_var))
    cpu = cpu_kernels()
    launch = cpu.GluDepthwiseConvForward(
        **_inputs(x, taps, lengths, kind, norm_weight, norm_bias, groups, args.eps, args.activation),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        bias=pointer(bias),
        out=pointer(out),
        y=pointer(y) if y.dim() == 3 else 0,
    )
    cpu.glu_depthwise_conv_forward(launch)
    if kind == "running" and not save:
        mean, var = (x.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return out, Statistics(y, mean, var, count)


def backward(
    dout: Tensor, args: GluDepthwiseConv, saved: Statistics, *, dx: Tensor | None = None, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, norm_weight = args.weight, args.norm_weight
    c, k = weight.shape
    kind = _norm(args.norm, args.training)
    x, dout, taps, lengths = unit_stride(args.x), unit_stride(dout), f32(weight.t()), i64(args.lengths)
    scale, shift = f32(norm_weight), f32(args.norm_bias)
    dx = x.new_empty(x.shape) if dx is None else dx
    dtaps, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in ((k, c), (c,)))
    dnorm = x.new_empty((0,) if norm_weight is None else (2, c), dtype=torch.float32)
    cpu = cpu_kernels()
    launch = cpu.GluDepthwiseConvBackward(
        **_inputs(x, taps, lengths, kind, scale, shift, args.num_groups, args.eps, args.activation),
        mean=pointer(saved.mean),
        var=pointer(saved.var),
        count=pointer(saved.frames),
        y=pointer(saved.y),
        dout=pointer(dout),
        dout_batch_stride=dout.stride(0),
        dout_frame_stride=dout.stride(1),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dnorm=pointer(dnorm),
    )
    cpu.glu_depthwise_conv_backward(launch)
    if partial:
        return dx, dtaps[None], dbias[None], dnorm[None]
    dnorm = dnorm.to(x.dtype if norm_weight is None else norm_weight.dtype)
    return dx, dtaps.to(weight.dtype), dbias.to(weight.dtype), dnorm
