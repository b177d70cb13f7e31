"""A residual addition and the LayerNorm that follows it.

s = x + alpha * drop(y),    n = LN(s)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._backend import select
from ._checks import check_same, check_shape, floats
from ._cpu import cpu_reasons
from ._fused import fused_kernels
from ._triton import dropout_seed, triton_reasons

__all__ = ["residual_layer_norm", "residual_layer_norm_reference"]

OP = "residual_layer_norm"


def residual_layer_norm_reference(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
    s = x + alpha * F.dropout(y, dropout_p)
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps)


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``(x + alpha * drop(y), LayerNorm of it)``.

    Args:
        x, y: ``[..., D]`` residual stream and branch.
        weight, bias: ``[D]`` of the LayerNorm.
        alpha: factor of the branch.
        dropout_p: probability of dropping an element of ``y``.

    Returns:
        two tensors shaped like ``x``, in its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
        NotImplementedError: a forced backend cannot serve them.
    """
    if x.dim() == 0:
        raise ValueError(f"{OP}: x has no dimensions; expected [..., D]")
    check_shape(OP, "y", y, tuple(x.shape), "[..., D]")
    check_shape(OP, "weight", weight, (x.shape[-1],), "[D]")
    check_shape(OP, "bias", bias, (x.shape[-1],), "[D]")
    check_same(OP, x=x, y=y)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.device != x.device:
            raise ValueError(f"{OP}: {name} is on {p.device} but x is on {x.device}; move them to one device")

    backend = backend_of(x, weight)
    if backend == "torch":
        return residual_layer_norm_reference(x, y, weight, bias, alpha=alpha, dropout_p=dropout_p, eps=eps)
    alpha, eps = floats(alpha, eps)
    tensors = (x, y, weight, bias, dropout_seed(x, dropout_p))
    if torch.is_grad_enabled() and any(p.requires_grad for p in tensors[:4]):
        return ResidualLayerNormFn.apply(*tensors, alpha, dropout_p, eps, backend)
    s, n, _mean, _rstd = torch.ops.lcconformer.residual_layer_norm_fwd(*tensors, alpha, dropout_p, eps, backend=backend)
    return s, n


# --- fused -----------------------------------------------------------------------------------------------------------


def backend_of(x: Tensor, weight: Tensor) -> str:
    """The backend that serves these inputs; of their values nothing is used."""
    candidates = {"triton": lambda: _triton_unsupported(x, weight), "cpu": lambda: cpu_reasons(x)}
    return select(OP, x.device.type, candidates)


# a program owns whole rows
MAX_WIDTH = 8192


def _triton_unsupported(x: Tensor, weight: Tensor) -> list[str]:
    reasons = triton_reasons(x)
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"a row is fused up to D = {MAX_WIDTH}, got D = {x.shape[-1]}")
    if weight.dtype == torch.float64:
        reasons.append("weight is float64")
    return reasons


torch.library.define(
    "lcconformer::residual_layer_norm_fwd",
    "(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? seed, float alpha, float dropout_p, float eps, "
    "*, str backend='triton') "
    "-> (Tensor s, Tensor n, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lcconformer::residual_layer_norm_bwd",
    "(Tensor ds, Tensor dn, Tensor s, Tensor mean, Tensor rstd, Tensor weight, Tensor? seed, float alpha, "
    "float dropout_p, *, str backend='triton') -> (Tensor dx, Tensor dy, Tensor dparams)",
)


@torch.library.impl("lcconformer::residual_layer_norm_fwd", ("CPU", "CUDA"))
def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).forward(*args)


@torch.library.impl("lcconformer::residual_layer_norm_bwd", ("CPU", "CUDA"))
def _bwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).backward(*args)


@torch.library.register_fake("lcconformer::residual_layer_norm_fwd")
def _fwd_fake(x, y, weight, bias, seed, alpha, dropout_p, eps, *, backend="triton"):
    rows = math.prod(x.shape[:-1])
    mean, rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@torch.library.register_fake("lcconformer::residual_layer_norm_bwd")
def _bwd_fake(ds, dn, s, mean, rstd, weight, seed, alpha, dropout_p, *, backend="triton"):
    dy = s.new_empty(s.shape if seed is not None or alpha != 1.0 else (0,))
    return s.new_empty(s.shape), dy, weight.new_empty((2, weight.shape[0]))


class ResidualLayerNormFn(torch.autograd.Function):
    """Keeps s and the statistics of its rows; dropout comes again from its seed."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, seed, alpha, dropout_p, eps, backend):
        s, n, mean, rstd = torch.ops.lcconformer.residual_layer_norm_fwd(
            x, y, weight, bias, seed, alpha, dropout_p, eps, backend=backend
        )
        ctx.save_for_backward(s, mean, rstd, weight, seed)
        ctx.options = (alpha, dropout_p)
        ctx.backend = backend
        ctx.same = seed is None and alpha == 1.0
        return s, n

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dn):
        dx, dy, dparams = torch.ops.lcconformer.residual_layer_norm_bwd(
            ds, dn, *ctx.saved_tensors, *ctx.options, backend=ctx.backend
        )
        dweight, dbias = dparams
        return (dx, dx if ctx.same else dy, dweight, dbias, None, None, None, None, None)
