"""glu_depthwise_conv on the Triton kernels (:mod:`lcconformer.kernels.glu_depthwise_conv`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..availability import triton_reasons
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = ["backward", "forward", "unsupported"]

# one program owns all channels of a frame
_MAX_LAYER_CHANNELS = 2048


def unsupported(traits: Traits) -> list[str]:
    reasons = triton_reasons(traits.device, traits.dtype)
    if traits.activation != "silu":
        reasons.append(f"activation {traits.activation!r} is not fused, only 'silu' is")
    if traits.norm == "layer" and traits.channels > _MAX_LAYER_CHANNELS:
        reasons.append(f"norm='layer' is fused up to C = {_MAX_LAYER_CHANNELS}, got C = {traits.channels}")
    if traits.norm_dtype == torch.float64:
        reasons.append("norm_weight is float64")
    return reasons


def forward(args: GluDepthwiseConv, save: bool, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
    from lcconformer.kernels import glu_depthwise_conv as kernels

    out, *saved = kernels.forward(
        args.x, args.weight, args.bias, args.lengths, args.norm_weight, args.norm_bias, args.running_mean, args.running_var,
        args.norm, args.num_groups, args.training, args.eps, save, out,
    )  # fmt: skip
    return out, Statistics(*saved)


def backward(
    dout: Tensor, args: GluDepthwiseConv, saved: Statistics, *, dx: Tensor | None = None, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lcconformer.kernels import glu_depthwise_conv_backward as kernels

    return kernels.backward(
        dout, args.x, args.weight, args.lengths, args.norm_weight, args.norm_bias, *saved, args.norm, args.num_groups,
        args.training, args.eps, dx=dx, partial=partial,
    )  # fmt: skip
