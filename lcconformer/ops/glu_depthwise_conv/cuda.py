"""glu_depthwise_conv on the CUDA kernels of csrc/cuda.

Without a norm, with LayerNorm, or with an evaluation BatchNorm folded into a scale and a shift.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcconformer import extension

from ..availability import capability, cuda_reasons
from ..native import f32, i64, pointer, unit_stride
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = ["backward", "costlier", "forward", "unsupported"]

_MAX_LAYER_CHANNELS = 1024  # kGluConvMaxLayerChannels of csrc/cuda/glu_depthwise_conv.h
_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unsupported(traits: Traits) -> list[str]:
    reasons = cuda_reasons(traits.device, traits.dtype)
    if traits.norm == "group" or traits.training:
        mode = " in training" if traits.norm == "batch" else ""
        reasons.append(f"norm={traits.norm!r}{mode} is not fused, only 'layer', and 'batch' in evaluation")
    if traits.norm == "layer" and traits.channels > _MAX_LAYER_CHANNELS:
        reasons.append(f"norm='layer' is fused up to C = {_MAX_LAYER_CHANNELS}, got C = {traits.channels}")
    if traits.norm_dtype == torch.float64:
        reasons.append("norm_weight is float64")
    if traits.activation != "silu":
        reasons.append(f"activation {traits.activation!r} is not fused, only 'silu' is")
    return reasons


# architectures that the model of bench/results/cuda_cost.json and Triton's costs cover
_MODELLED = (80, 90)


def costlier(traits: Traits) -> str:
    """Say why ``auto`` takes Triton's kernel: this one does not cost less in every such case of cuda_cost.json.

    No GPU has run either; a test holds these reasons to the file.
    """
    forces = "on request only, until a GPU has measured it: "
    if traits.dtype == torch.float32:
        return f"{forces}float32 does without tensor cores, and has no prediction"
    if traits.gradients:
        return f"{forces}its backward pass has no prediction"
    if traits.norm_dtype not in (None, torch.float32):
        return f"{forces}norm_weight and the like are {traits.norm_dtype}, to be converted by a kernel each"
    if traits.channels % 8:
        return f"{forces}predictions are for channels in eights"
    if traits.norm == "layer":
        return f"{forces}the model has it slower than Triton's for a short utterance alone"
    if capability(traits.device.type, traits.device.index) not in _MODELLED:
        return f"{forces}predictions are for sm_80 and sm_90"
    return ""


class _Affine(NamedTuple):
    """What follows the convolution, or LayerNorm's own normalisation: float32 ``[C]``, or None without a norm.

    Attributes:
        scale, shift: multiplied and added.
        inverse: 1 / deviation of an evaluation BatchNorm, which is part of ``scale``.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    inverse: Tensor | None = None


def _kernels() -> ModuleType:
    return extension.load().cuda


def _inputs(
    kernels: Any, args: GluDepthwiseConv, x: Tensor, weight: Tensor, lengths: Tensor | None, affine: _Affine
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
        "scale": pointer(affine.scale),
        "shift": pointer(affine.shift),
        "layer_norm": args.norm == "layer",
        "eps": args.eps,
        "device": x.device.index if on_gpu else 0,
        "stream": torch.cuda.current_stream(x.device).cuda_stream if on_gpu else 0,
    }


def _affine(args: GluDepthwiseConv, mean: Tensor | None, var: Tensor | None) -> _Affine:
    if args.norm_weight is None or args.norm_bias is None:
        return _Affine()
    weight, bias = args.norm_weight.float().contiguous(), args.norm_bias.float().contiguous()
    if args.norm == "layer" or mean is None or var is None:
        return _Affine(weight, bias)
    inverse = torch.rsqrt(var.float() + args.eps)
    return _Affine(weight * inverse, bias - mean.float() * weight * inverse, inverse)


def forward(args: GluDepthwiseConv, save: bool, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
    kernels = _kernels()
    x, weight, lengths = unit_stride(args.x), args.weight.contiguous(), i64(args.lengths)
    shape = (*x.shape[:2], weight.shape[0])
    bias = None if args.bias is None else args.bias.contiguous()
    # an evaluation BatchNorm is folded by the kernel: each tensor computed here would be a launch
    affine, running = _affine(args, None, None), (f32(args.running_mean), f32(args.running_var))
    out, y = x.new_empty(shape) if out is None else out, x.new_empty(shape if save else (0,))
    launch = kernels.GluDepthwiseConvForward(
        **_inputs(kernels, args, x, weight, lengths, affine),
        bias=pointer(bias),
        mean=pointer(running[0]),
        var=pointer(running[1]),
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
    affine = _affine(args, saved.mean, saved.var)
    daffine = x.new_empty((2, c), dtype=torch.float32)  # of shift, of scale
    slots = kernels.glu_depthwise_conv_slots(b, t, c)
    scratch = x.new_empty((slots, k + 3, c), dtype=torch.float32)
    rows = x.new_empty((b, t, 4) if args.norm == "layer" else (0,), dtype=torch.float32)
    launch = kernels.GluDepthwiseConvBackward(
        **_inputs(kernels, args, x, weight, lengths, affine),
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
        rows=pointer(rows),
    )
    kernels.glu_depthwise_conv_backward(launch)
    if norm_weight is None:
        dnorm = x.new_empty((0,))
    else:
        if affine.inverse is not None:
            daffine[1].sub_(saved.mean * daffine[0]).mul_(affine.inverse)
        dnorm = daffine if partial else daffine.to(norm_weight.dtype)
    if partial:
        return dx, dtaps[None], dbias[None], dnorm[None]
    return dx, dtaps, dbias, dnorm
