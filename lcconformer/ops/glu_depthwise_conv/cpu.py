"""glu_depthwise_conv on the CPU kernels of csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..availability import cpu_reasons
from ..native import f32, i64, pointer, run, unit_stride
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = ["backward", "forward", "unsupported"]

_NONE, _LAYER, _RUNNING, _BATCH, _GROUP = range(5)  # enum Norm of csrc/cpu/kernels.h


def unsupported(traits: Traits) -> list[str]:
    reasons = cpu_reasons(traits.device, traits.dtype)
    if traits.activation != "silu":
        reasons.append(f"activation {traits.activation!r} is not fused, only 'silu' is")
    return reasons


def _norm(norm: str, training: bool) -> int:
    if norm == "batch":
        return _BATCH if training else _RUNNING
    return {"none": _NONE, "layer": _LAYER, "group": _GROUP}[norm]


def _fields(x, taps, lengths, norm_weight, norm_bias, mode, num_groups, eps) -> dict[str, Any]:
    """The caller keeps the tensors alive."""
    b, t, _ = x.shape
    k, c = taps.shape
    return {
        "x": pointer(x),
        "x_stride_b": x.stride(0),
        "x_stride_t": x.stride(1),
        "taps": pointer(taps),
        "lengths": pointer(lengths),
        "norm": mode,
        "norm_weight": pointer(norm_weight),
        "norm_bias": pointer(norm_bias),
        "B": b,
        "T": t,
        "C": c,
        "K": k,
        "groups": num_groups,
        "eps": eps,
    }


def forward(args: GluDepthwiseConv, save: bool) -> tuple[Tensor, Statistics]:
    b, t, _ = args.x.shape
    c, groups = args.weight.shape[0], args.num_groups
    mode = _norm(args.norm, args.training)
    x, taps, lengths = unit_stride(args.x), f32(args.weight.t()), i64(args.lengths)
    bias, norm_weight, norm_bias = f32(args.bias), f32(args.norm_weight), f32(args.norm_bias)
    out = x.new_empty((b, t, c))
    y = x.new_empty((b, t, c) if save or mode in (_BATCH, _GROUP) else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if mode == _BATCH:
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
    elif mode == _GROUP:
        mean, var = (x.new_empty((b, groups), dtype=torch.float32) for _ in range(2))
    elif args.running_mean is not None and args.running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (args.running_mean, args.running_var))
    run(
        "conv_forward",
        x,
        **_fields(x, taps, lengths, norm_weight, norm_bias, mode, groups, args.eps),
        bias=pointer(bias),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        out=pointer(out),
        y=pointer(y) if y.dim() == 3 else 0,
    )
    if mode == _RUNNING and not save:
        mean, var = (x.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return out, Statistics(y, mean, var, count)


def backward(dout: Tensor, args: GluDepthwiseConv, saved: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, norm_weight = args.weight, args.norm_weight
    c, k = weight.shape
    mode = _norm(args.norm, args.training)
    x, dout, taps, lengths = unit_stride(args.x), unit_stride(dout), f32(weight.t()), i64(args.lengths)
    scale, shift = f32(norm_weight), f32(args.norm_bias)
    dx = x.new_empty(x.shape)
    dtaps, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in ((k, c), (c,)))
    dnorm = x.new_empty((0,) if norm_weight is None else (2, c), dtype=torch.float32)
    run(
        "conv_backward",
        x,
        **_fields(x, taps, lengths, scale, shift, mode, args.num_groups, args.eps),
        y=pointer(saved.y),
        mean=pointer(saved.mean),
        var=pointer(saved.var),
        count=pointer(saved.frames),
        dout=pointer(dout),
        dout_stride_b=dout.stride(0),
        dout_stride_t=dout.stride(1),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dnorm=pointer(dnorm),
    )
    dnorm = dnorm.to(x.dtype if norm_weight is None else norm_weight.dtype)
    return dx, dtaps.to(weight.dtype), dbias.to(weight.dtype), dnorm
