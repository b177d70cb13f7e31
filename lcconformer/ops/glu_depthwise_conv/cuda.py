"""glu_depthwise_conv on the CUDA kernels of csrc/cuda.

Without a norm, or with an evaluation BatchNorm folded into a scale and a shift.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lcconformer import extension

from ..availability import cuda_reasons
from ..native import i64, pointer, unit_stride
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = ["backward", "forward", "unsupported"]

_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unsupported(traits: Traits) -> list[str]:
    reasons = cuda_reasons(traits.device, traits.dtype)
    if traits.norm not in ("none", "batch") or traits.training:
        mode = " in training" if traits.norm == "batch" else ""
        reasons.append(f"norm={traits.norm!r}{mode} is not fused, only 'batch' in evaluation")
    if traits.activation != "silu":
        reasons.append(f"activation {traits.activation!r} is not fused, only 'silu' is")
    return reasons


def _kernels() -> ModuleType:
    return extension.load().cuda


def _inputs(
    kernels: Any, x: Tensor, weight: Tensor, lengths: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> dict[str, Any]:
    """Arguments that forward and backward share; the caller keeps the tensors alive."""
    b, t, _ = x.shape
    c, k = weight.shape
    on_gpu = x.device.type == "cuda"
    return {
        "element": getattr(kernels.Element, _ELEMENTS[x.dtype]),
        "batch": b,
        "frames": t,
        "channels": c,
        "width": k,
        "x": pointer(x),
        "x_batch_stride": x.stride(0),
        "x_frame_stride": x.stride(1),
        "weight": pointer(weight),
        "lengths": pointer(lengths),
        "scale": pointer(scale),
        "shift": pointer(shift),
        "device": x.device.index if on_gpu else 0,
        "stream": torch.cuda.current_stream(x.device).cuda_stream if on_gpu else 0,
    }


def _fold(norm_weight, norm_bias, mean, var, eps) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(1 / deviation, scale, shift) of the norm by known statistics: float32 [C], or None without one."""
    if norm_weight is None:
        return None, None, None
    inverse = torch.rsqrt(var.float() + eps)
    scale = norm_weight.float() * inverse
    return inverse, scale, norm_bias.float() - mean.float() * scale


def forward(args: GluDepthwiseConv, save: bool, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
    kernels = _kernels()
    x, weight, lengths = unit_stride(args.x), args.weight.contiguous(), i64(args.lengths)
    shape = (*x.shape[:2], weight.shape[0])
    bias = None if args.bias is None else args.bias.contiguous()
    _, scale, shift = _fold(args.norm_weight, args.norm_bias, args.running_mean, args.running_var, args.eps)
    out, y = x.new_empty(shape) if out is None else out, x.new_empty(shape if save else (0,))
    launch = kernels.GluDepthwiseConvForward(
        **_inputs(kernels, x, weight, lengths, scale, shift),
        bias=pointer(bias),
        out=pointer(out),
        y=pointer(y) if save else 0,
    )
    kernels.glu_depthwise_conv_forward(launch)
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if save and args.running_mean is not None and args.running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (args.running_mean, args.running_var))
    return out, Statistics(y, mean, var, count)


def backward(
    dout: Tensor, args: GluDepthwiseConv, saved: Statistics, *, dx: Tensor | None = None, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels()
    x, weight, norm_weight = args.x, args.weight, args.norm_weight
    b, t, _ = x.shape
    c, k = weight.shape
    dx = x.new_empty(x.shape) if dx is None else dx
    dtaps, dbias = weight.new_empty((k, c)), weight.new_empty((c,))
    x, weight, dout, lengths = unit_stride(x), weight.contiguous(), unit_stride(dout), i64(args.lengths)
    inverse, scale, shift = _fold(norm_weight, args.norm_bias, saved.mean, saved.var, args.eps)
    daffine = x.new_empty((2, c), dtype=torch.float32)  # of shift, of scale
    slots = kernels.glu_depthwise_conv_slots(b, t, c)
    scratch = x.new_empty((slots, k + 2, c), dtype=torch.float32)
    launch = kernels.GluDepthwiseConvBackward(
        **_inputs(kernels, x, weight, lengths, scale, shift),
        dout=pointer(dout),
        dout_batch_stride=dout.stride(0),
        dout_frame_stride=dout.stride(1),
        y=pointer(saved.y),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dshift=pointer(daffine[0]),
        dscale=pointer(daffine[1]),
        partial=pointer(scratch),
        slots=slots,
    )
    kernels.glu_depthwise_conv_backward(launch)
    if norm_weight is None or inverse is None:
        dnorm = x.new_empty((0,))
    else:
        daffine[1].sub_(saved.mean * daffine[0]).mul_(inverse)
        dnorm = daffine if partial else daffine.to(norm_weight.dtype)
    if partial:
        return dx, dtaps[None], dbias[None], dnorm[None]
    return dx, dtaps, dbias, dnorm
