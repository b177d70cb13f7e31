"""glu_depthwise_conv as a ``torch.library`` operator: schema, fake kernels, autograd, and dispatch to the backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import ON_OPS, differentiable_once
from ..dispatch import undispatched
from ..registry import Op
from . import cpu, cuda, reference, triton
from .arguments import Backend, GluDepthwiseConv, Statistics, Traits

__all__ = ["OP", "GluDepthwiseConvFn", "launch_forward"]

_BACKENDS: dict[str, Backend] = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": reference}
OP: Op[Traits, Backend] = Op("glu_depthwise_conv", _BACKENDS, on_request={"cuda": cuda.costlier})

_TENSORS = 8  # fields of GluDepthwiseConv that are tensors, the first ones

torch.library.define(
    "lcconformer::glu_depthwise_conv_fwd",
    f"({GluDepthwiseConv.schema()}, bool save, *, str backend='triton') "
    "-> (Tensor out, Tensor y, Tensor mean, Tensor var, Tensor count)",
)
torch.library.define(
    "lcconformer::glu_depthwise_conv_bwd",
    f"(Tensor dout, {GluDepthwiseConv.schema()}, Tensor y, Tensor mean, Tensor var, Tensor count, "
    "*, str backend='triton') -> (Tensor dx, Tensor dtaps, Tensor dbias, Tensor dnorm)",
)


def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, save = args
    out, saved = OP.backends[backend].forward(GluDepthwiseConv(*arguments), save)
    return out, *saved


def _bwd(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, y, mean, var, count = args
    return OP.backends[backend].backward(dout, GluDepthwiseConv(*arguments), Statistics(y, mean, var, count))


torch.library.impl("lcconformer::glu_depthwise_conv_fwd", ("CPU", "CUDA"), _fwd)
torch.library.impl("lcconformer::glu_depthwise_conv_bwd", ("CPU", "CUDA"), _bwd)


@torch.library.register_fake("lcconformer::glu_depthwise_conv_fwd")
def _fwd_fake(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, save = args
    call = GluDepthwiseConv(*arguments)
    x, c = call.x, call.weight.shape[0]
    b, t, _ = x.shape
    shape: tuple[int, ...] = (0,)
    if call.norm == "group":
        shape = (b, call.num_groups)
    elif call.norm == "batch" and (call.training or save):
        shape = (c,)
    mean, var = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    count = x.new_empty((1 if call.training else 0,), dtype=torch.float32)
    keep = save or call.training or call.norm == "group"
    return x.new_empty((b, t, c)), x.new_empty((b, t, c) if keep else (0,)), mean, var, count


@torch.library.register_fake("lcconformer::glu_depthwise_conv_bwd")
def _bwd_fake(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, _y, _mean, _var, _count = args
    call = GluDepthwiseConv(*arguments)
    c, k = call.weight.shape
    dnorm = call.x.new_empty((0,)) if call.norm_weight is None else call.norm_weight.new_empty((2, c))
    return call.x.new_empty(call.x.shape), call.weight.new_empty((k, c)), call.weight.new_empty((c,)), dnorm


launch_forward = undispatched(torch.ops.lcconformer.glu_depthwise_conv_fwd, _fwd)
launch_backward = undispatched(torch.ops.lcconformer.glu_depthwise_conv_bwd, _bwd)


class GluDepthwiseConvFn(torch.autograd.Function):
    """Keeps the input and the convolution's output; the backward recomputes GLU, norm and activation.

    ``apply(*GluDepthwiseConv.flat(), backend)`` -> (out, mean, var, count).
    """

    @staticmethod
    def forward(ctx, *args):
        *arguments, backend = args
        call = GluDepthwiseConv(*arguments)
        out, *saved = launch_forward(*arguments, True, backend=backend)
        ctx.save_for_backward(call.x, call.weight, call.lengths, call.norm_weight, call.norm_bias, *saved)
        ctx.options, ctx.backend = tuple(arguments[_TENSORS:]), backend
        ctx.has_bias = call.bias is not None
        _y, mean, var, count = saved
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @differentiable_once(OP.name, ON_OPS)
    def backward(ctx, saved_tensors, dout, *_):
        x, weight, lengths, norm_weight, norm_bias, *saved = saved_tensors
        # bias and running statistics are not read, and the latter may have moved since
        inputs = (x, weight, None, lengths, norm_weight, norm_bias, None, None)
        dx, dtaps, dbias, dnorm = launch_backward(dout, *inputs, *ctx.options, *saved, backend=ctx.backend)
        dnorm_bias, dnorm_weight = dnorm if dnorm.numel() else (None, None)
        return dx, dtaps.t(), dbias if ctx.has_bias else None, None, dnorm_weight, dnorm_bias, *(None,) * 8
