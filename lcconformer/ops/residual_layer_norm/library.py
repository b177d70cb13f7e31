"""residual_layer_norm as a ``torch.library`` operator: schema, fake kernels, autograd, and dispatch to the backends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..derivatives import ON_OPS, differentiable_once
from ..dispatch import undispatched
from ..registry import Op
from . import cpu, reference, triton
from .arguments import Backend, ResidualLayerNorm, Traits

__all__ = ["OP", "ResidualLayerNormFn", "launch_forward"]

_BACKENDS: dict[str, Backend] = {"triton": triton, "cpu": cpu, "torch": reference}
OP: Op[Traits, Backend] = Op("residual_layer_norm", _BACKENDS)

torch.library.define(
    "lcconformer::residual_layer_norm_fwd",
    f"({ResidualLayerNorm.schema()}, *, str backend='triton') -> (Tensor s, Tensor n, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lcconformer::residual_layer_norm_bwd",
    "(Tensor ds, Tensor dn, Tensor s, Tensor mean, Tensor rstd, Tensor weight, Tensor? seed, float alpha, "
    "float dropout_p, *, str backend='triton') -> (Tensor dx, Tensor dy, Tensor dparams)",
)


def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return OP.backends[backend].forward(ResidualLayerNorm(*args))


def _bwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return OP.backends[backend].backward(*args)


torch.library.impl("lcconformer::residual_layer_norm_fwd", ("CPU", "CUDA"), _fwd)
torch.library.impl("lcconformer::residual_layer_norm_bwd", ("CPU", "CUDA"), _bwd)


@torch.library.register_fake("lcconformer::residual_layer_norm_fwd")
def _fwd_fake(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    x = ResidualLayerNorm(*args).x
    rows = math.prod(x.shape[:-1])
    mean, rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@torch.library.register_fake("lcconformer::residual_layer_norm_bwd")
def _bwd_fake(ds, dn, s, mean, rstd, weight, seed, alpha, dropout_p, *, backend="triton") -> tuple[Tensor, ...]:
    dy = s.new_empty(s.shape if seed is not None or alpha != 1.0 else (0,))
    return s.new_empty(s.shape), dy, weight.new_empty((2, weight.shape[0]))


launch_forward = undispatched(torch.ops.lcconformer.residual_layer_norm_fwd, _fwd)
launch_backward = undispatched(torch.ops.lcconformer.residual_layer_norm_bwd, _bwd)


class ResidualLayerNormFn(torch.autograd.Function):
    """Keeps s and the statistics of its rows; recomputes dropout from its seed.

    ``apply(*ResidualLayerNorm.flat(), backend)``.
    """

    @staticmethod
    def forward(ctx, *args):
        *arguments, backend = args
        call = ResidualLayerNorm(*arguments)
        s, n, mean, rstd = launch_forward(*arguments, backend=backend)
        ctx.save_for_backward(s, mean, rstd, call.weight, call.seed)
        ctx.options, ctx.backend = (call.alpha, call.dropout_p), backend
        ctx.same = call.seed is None and call.alpha == 1.0
        return s, n

    @staticmethod
    @differentiable_once(OP.name, ON_OPS)
    def backward(ctx, saved_tensors, ds, dn):
        dx, dy, dparams = launch_backward(ds, dn, *saved_tensors, *ctx.options, backend=ctx.backend)
        dweight, dbias = dparams
        return dx, dx if ctx.same else dy, dweight, dbias, *(None,) * 5  # seed, alpha, dropout_p, eps, backend
