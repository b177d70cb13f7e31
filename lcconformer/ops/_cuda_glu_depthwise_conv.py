"""glu_depthwise_conv on the CUDA kernels of csrc/cuda; arguments and results as those of lcconformer.kernels.

Without a norm, or with an evaluation BatchNorm folded into a scale and a shift.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lcconformer import _extension

from ._cpu import i64, pointer, unit_stride

__all__ = ["backward", "cuda_unsupported", "forward"]

_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _device_reasons(device_type: str, index: int | None) -> list[str]:
    """A constant of the process, also to a tracer."""
    if device_type != "cuda":
        return [f"the tensors are on device type {device_type!r}"]
    major, minor = torch.cuda.get_device_capability(index)
    return _extension.cuda_reasons(10 * major + minor)


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo
_device_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cuda_unsupported(x: Tensor, norm: str, training: bool, activation: str) -> list[str]:
    """Why the CUDA kernels cannot take these inputs; empty: they can."""
    reasons = list(_device_reasons(x.device.type, x.device.index))
    if x.dtype not in _ELEMENTS:
        reasons.append(f"dtype {x.dtype} is not one of float16, bfloat16, float32")
    if norm not in ("none", "batch") or (norm == "batch" and training):
        reasons.append(
            f"norm={norm!r}{' in training' if norm == 'batch' else ''} is not fused, only 'batch' in evaluation"
        )
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    return reasons


def _kernels() -> ModuleType:
    return _extension.load().cuda


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
    """(out [B, T, C], y, mean, var, count): what the backward needs is filled if ``save``, else empty."""
    kernels = _kernels()
    shape = (*x.shape[:2], weight.shape[0])
    x, weight, lengths = unit_stride(x), weight.contiguous(), i64(lengths)
    bias = None if bias is None else bias.contiguous()
    _, scale, shift = _fold(norm_weight, norm_bias, running_mean, running_var, eps)
    out, y = x.new_empty(shape), x.new_empty(shape if save else (0,))
    args = kernels.GluDepthwiseConvForward(
        **_inputs(kernels, x, weight, lengths, scale, shift),
        bias=pointer(bias),
        out=pointer(out),
        y=pointer(y) if save else 0,
    )
    kernels.glu_depthwise_conv_forward(args)
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if save and running_mean is not None and running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (running_mean, running_var))
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
    kernels = _kernels()
    b, t, _ = x.shape
    c, k = weight.shape
    dx, dtaps, dbias = x.new_empty(x.shape), weight.new_empty((k, c)), weight.new_empty((c,))
    x, weight, dout, lengths = unit_stride(x), weight.contiguous(), unit_stride(dout), i64(lengths)
    inverse, scale, shift = _fold(norm_weight, norm_bias, mean, var, eps)
    daffine = x.new_empty((2, c), dtype=torch.float32)  # of shift, of scale
    slots = kernels.glu_depthwise_conv_slots(b, t, c)
    partial = x.new_empty((slots, k + 2, c), dtype=torch.float32)
    args = kernels.GluDepthwiseConvBackward(
        **_inputs(kernels, x, weight, lengths, scale, shift),
        dout=pointer(dout),
        dout_batch_stride=dout.stride(0),
        dout_frame_stride=dout.stride(1),
        y=pointer(y),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dshift=pointer(daffine[0]),
        dscale=pointer(daffine[1]),
        partial=pointer(partial),
        slots=slots,
    )
    kernels.glu_depthwise_conv_backward(args)
    if norm_weight is None or inverse is None:
        return dx, dtaps, dbias, x.new_empty((0,))
    daffine[1].sub_(mean * daffine[0]).mul_(inverse)
    return dx, dtaps, dbias, daffine.to(norm_weight.dtype)
