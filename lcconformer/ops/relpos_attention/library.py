"""relpos_attention as a ``torch.library`` operator: schema, fake kernels, autograd, and dispatch to the backends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..derivatives import ON_OPS, differentiable_once
from ..dispatch import undispatched
from ..registry import Op, until_measured
from . import cpu, cuda, reference, triton
from .arguments import Backend, RelposAttention, Traits

__all__ = ["OP", "RelposAttentionFn", "launch_forward"]

_BACKENDS: dict[str, Backend] = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": reference}
OP: Op[Traits, Backend] = Op("relpos_attention", _BACKENDS, on_request={"cuda": until_measured})

torch.library.define(
    "lcconformer::relpos_attention_fwd",
    f"({RelposAttention.schema()}, *, str backend='triton') -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "lcconformer::relpos_attention_bwd",
    f"(Tensor dout, {RelposAttention.schema()}, Tensor out, Tensor lse, *, str backend='triton') "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dpos, Tensor du, Tensor dv_bias)",
)


def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, Tensor]:
    return OP.backends[backend].forward(RelposAttention(*args))


def _bwd(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    *arguments, out, lse = args
    return OP.backends[backend].backward(dout, RelposAttention(*arguments), out, lse)


torch.library.impl("lcconformer::relpos_attention_fwd", ("CPU", "CUDA"), _fwd)
torch.library.impl("lcconformer::relpos_attention_bwd", ("CPU", "CUDA"), _bwd)


@torch.library.register_fake("lcconformer::relpos_attention_fwd")
def _fwd_fake(*args: Any, backend: str = "triton") -> tuple[Tensor, Tensor]:
    q = RelposAttention(*args).q
    *frames, h, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((h, math.prod(frames)), dtype=torch.float32)


@torch.library.register_fake("lcconformer::relpos_attention_bwd")
def _bwd_fake(dout: Tensor, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[:6])  # q, k, v, pos, u, v_bias


launch_forward = undispatched(torch.ops.lcconformer.relpos_attention_fwd, _fwd)
launch_backward = undispatched(torch.ops.lcconformer.relpos_attention_bwd, _bwd)


class RelposAttentionFn(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp of each row; recomputes weights and dropout from those.

    ``apply(*RelposAttention.flat(), backend)``.
    """

    @staticmethod
    def forward(ctx, *args):
        *arguments, backend = args
        out, lse = launch_forward(*arguments, backend=backend)
        *tensors, dropout_p = arguments
        ctx.save_for_backward(*tensors, out, lse)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return out

    @staticmethod
    @differentiable_once(OP.name, ON_OPS)
    def backward(ctx, saved_tensors, dout):
        *tensors, out, lse = saved_tensors
        gradients = launch_backward(dout, *tensors, ctx.dropout_p, out, lse, backend=ctx.backend)
        return *gradients, *(None,) * 5  # lengths, cu_seqlens, seed, dropout_p, backend
