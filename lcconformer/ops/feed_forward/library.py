"""feed_forward as a ``torch.library`` operator: schema, fake kernels, autograd, and dispatch to the backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import ON_OPS, differentiable_once
from ..dispatch import undispatched
from ..registry import Op
from . import cpu, reference, triton
from .arguments import Backend, FeedForward, Traits

__all__ = ["OP", "FeedForwardFn", "launch_forward"]

_BACKENDS: dict[str, Backend] = {"triton": triton, "cpu": cpu, "torch": reference}
OP: Op[Traits, Backend] = Op("feed_forward", _BACKENDS)

_TENSORS = 8  # fields of FeedForward that are tensors, the first ones

torch.library.define(
    "lcconformer::feed_forward_fwd",
    f"({FeedForward.schema()}, bool save, *, str backend='triton') -> (Tensor out, Tensor mean, Tensor rstd, Tensor u)",
)
torch.library.define(
    "lcconformer::feed_forward_bwd",
    f"(Tensor dout, {FeedForward.schema()}, Tensor mean, Tensor rstd, Tensor u, *, str backend='triton') "
    "-> (Tensor dx, Tensor dnorm, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
)


def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, save = args
    return OP.backends[backend].forward(FeedForward(*arguments), save)


def _bwd(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, mean, rstd, u = args
    return OP.backends[backend].backward(dout, FeedForward(*arguments), mean, rstd, u)


torch.library.impl("lcconformer::feed_forward_fwd", ("CPU", "CUDA"), _fwd)
torch.library.impl("lcconformer::feed_forward_bwd", ("CPU", "CUDA"), _bwd)


@torch.library.register_fake("lcconformer::feed_forward_fwd")
def _fwd_fake(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, save = args
    call = FeedForward(*arguments)
    x, rows = call.x, call.x.shape[0] * call.x.shape[1]
    mean, rstd = (x.new_empty((rows if save else 0,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd, call.w1.new_empty((rows, call.w1.shape[0]) if save else (0,))


@torch.library.register_fake("lcconformer::feed_forward_bwd")
def _bwd_fake(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, _mean, _rstd, _u = args
    call = FeedForward(*arguments)
    f, d = call.w1.shape
    dw1, db1 = call.w1.new_empty((f, d)), call.w1.new_empty((f,))
    dw2, db2 = call.w2.new_empty((d, f)), call.w2.new_empty((d,))
    return call.x.new_empty(call.x.shape), call.norm_weight.new_empty((2, d)), dw1, db1, dw2, db2


launch_forward = undispatched(torch.ops.lcconformer.feed_forward_fwd, _fwd)
launch_backward = undispatched(torch.ops.lcconformer.feed_forward_bwd, _bwd)


class FeedForwardFn(torch.autograd.Function):
    """Keeps x, the statistics of its rows and the up-projection; recomputes norm, activation and dropout.

    ``apply(*FeedForward.flat(), backend)``.
    """

    @staticmethod
    def forward(ctx, *args):
        *arguments, backend = args
        out, mean, rstd, u = launch_forward(*arguments, True, backend=backend)
        ctx.save_for_backward(*arguments[:_TENSORS], mean, rstd, u)
        ctx.options, ctx.backend = tuple(arguments[_TENSORS:]), backend
        return out

    @staticmethod
    @differentiable_once(OP.name, ON_OPS)
    def backward(ctx, saved_tensors, dout):
        *tensors, mean, rstd, u = saved_tensors
        dx, dnorm, dw1, db1, dw2, db2 = launch_backward(
            dout, *tensors, *ctx.options, mean, rstd, u, backend=ctx.backend
        )
        _x, _norm_weight, _norm_bias, _w1, b1, _w2, b2, _seed = tensors
        dnorm_weight, dnorm_bias = dnorm
        db1, db2 = None if b1 is None else db1, None if b2 is None else db2
        # seed, scale, activation, dropout_p, eps, backend
        return dx, dnorm_weight, dnorm_bias, dw1, db1, dw2, db2, *(None,) * 6
