"""Half-step feed-forward with its pre-norm and residual (Gulati et al. 2020, section 2.3; Macaron-Net).

out = x + scale * drop(W2 drop(act(W1 LN(x) + b1)) + b2)
"""

from __future__ import annotations

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
from .glu_depthwise_conv import ACTIVATIONS
from .residual_layer_norm import MAX_WIDTH

__all__ = ["feed_forward", "feed_forward_reference"]

OP = "feed_forward"


def feed_forward_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    scale: float = 0.5,
    activation: str = "silu",
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    h = F.dropout(ACTIVATIONS[activation](F.linear(h, w1, b1)), dropout_p)  # [B, T, F]
    return x + scale * F.dropout(F.linear(h, w2, b2), dropout_p)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    scale: float = 0.5,
    activation: str = "silu",
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Residual feed-forward branch (module docstring).

    Args:
        x: ``[B, T, D]``.
        norm_weight, norm_bias: ``[D]`` of the LayerNorm before the branch.
        w1, b1: ``[F, D]``, ``[F]`` (or None); w2, b2: ``[D, F]``, ``[D]`` (or None).
        scale: factor of the branch, 1/2 in a Conformer.
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.
        dropout_p: dropout after the activation and after the second projection.

    Returns:
        ``[B, T, D]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
        NotImplementedError: a forced backend cannot serve them.
    """
    check_shape(OP, "x", x, (None, None, None), "[B, T, D]")
    d = x.shape[-1]
    check_shape(OP, "w1", w1, (None, d), "[F, D]")
    f = w1.shape[0]
    check_shape(OP, "w2", w2, (d, f), "[D, F]")
    check_shape(OP, "norm_weight", norm_weight, (d,), "[D]")
    check_shape(OP, "norm_bias", norm_bias, (d,), "[D]")
    if b1 is not None:
        check_shape(OP, "b1", b1, (f,), "[F]")
    if b2 is not None:
        check_shape(OP, "b2", b2, (d,), "[D]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    if torch.is_autocast_enabled(x.device.type):
        # as F.linear would; the residual stream keeps its dtype
        dtype = torch.get_autocast_dtype(x.device.type)
        w1, w2 = w1.to(dtype), w2.to(dtype)
        b1, b2 = None if b1 is None else b1.to(dtype), None if b2 is None else b2.to(dtype)
        check_same(OP, w1=w1, w2=w2, b1=b1, b2=b2)
    else:
        check_same(OP, x=x, w1=w1, w2=w2, b1=b1, b2=b2)
    for name, p in (("w1", w1), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if p.device != x.device:
            raise ValueError(f"{OP}: {name} is on {p.device} but x is on {x.device}; move them to one device")

    backend = backend_of(x, norm_weight, w1, activation)
    if backend == "torch":
        return feed_forward_reference(
            x, norm_weight, norm_bias, w1, b1, w2, b2, scale=scale, activation=activation, dropout_p=dropout_p, eps=eps
        )
    scale, eps = floats(scale, eps)
    tensors = (x, norm_weight, norm_bias, w1, b1, w2, b2, dropout_seed(x, dropout_p))
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in tensors):
        return FeedForwardFn.apply(*tensors, scale, dropout_p, eps, backend)
    return torch.ops.lcconformer.feed_forward_fwd(*tensors, scale, dropout_p, eps, False, backend=backend)[0]


# --- fused -----------------------------------------------------------------------------------------------------------


def backend_of(x: Tensor, norm_weight: Tensor, w1: Tensor, activation: str) -> str:
    """The backend that serves these inputs; of their values nothing is used."""
    candidates = {
        "triton": lambda: _triton_unsupported(x, norm_weight, w1, activation),
        "cpu": lambda: _cpu_unsupported(x, w1, activation),
    }
    return select(OP, x.device.type, candidates)


def _triton_unsupported(x: Tensor, norm_weight: Tensor, w1: Tensor, activation: str) -> list[str]:
    reasons = triton_reasons(x)
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"a row is fused up to D = {MAX_WIDTH}, got D = {x.shape[-1]}")
    if torch.float64 in (norm_weight.dtype, w1.dtype):
        reasons.append("a weight is float64")
    return reasons


def _cpu_unsupported(x: Tensor, w1: Tensor, activation: str) -> list[str]:
    reasons = cpu_reasons(x)
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    if x.dtype != w1.dtype:
        reasons.append(f"x is {x.dtype} and the weights are {w1.dtype} (autocast)")
    return reasons


torch.library.define(
    "lcconformer::feed_forward_fwd",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? seed, "
    "float scale, float dropout_p, float eps, bool save, *, str backend='triton') "
    "-> (Tensor out, Tensor mean, Tensor rstd, Tensor u)",
)
torch.library.define(
    "lcconformer::feed_forward_bwd",
    "(Tensor dout, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor mean, "
    "Tensor rstd, Tensor u, Tensor? seed, float scale, float dropout_p, *, str backend='triton') "
    "-> (Tensor dx, Tensor dnorm, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
)


@torch.library.impl("lcconformer::feed_forward_fwd", ("CPU", "CUDA"))
def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).forward(*args)


@torch.library.impl("lcconformer::feed_forward_bwd", ("CPU", "CUDA"))
def _bwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).backward(*args)


@torch.library.register_fake("lcconformer::feed_forward_fwd")
def _fwd_fake(x, norm_weight, norm_bias, w1, b1, w2, b2, seed, scale, dropout_p, eps, save, *, backend="triton"):
    rows = x.shape[0] * x.shape[1]
    mean, rstd = (x.new_empty((rows if save else 0,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd, w1.new_empty((rows, w1.shape[0]) if save else (0,))


@torch.library.register_fake("lcconformer::feed_forward_bwd")
def _bwd_fake(dout, x, norm_weight, norm_bias, w1, b1, w2, mean, rstd, u, seed, scale, dropout_p, *, backend="triton"):
    f, d = w1.shape
    dnorm = norm_weight.new_empty((2, d))
    dw1, db1 = w1.new_empty((f, d)), w1.new_empty((f,))
    return x.new_empty(x.shape), dnorm, dw1, db1, w2.new_empty((d, f)), w2.new_empty((d,))


class FeedForwardFn(torch.autograd.Function):
    """Keeps x, the statistics of its rows and the up-projection; the rest comes again."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, w1, b1, w2, b2, seed, scale, dropout_p, eps, backend):
        out, mean, rstd, u = torch.ops.lcconformer.feed_forward_fwd(
            x, norm_weight, norm_bias, w1, b1, w2, b2, seed, scale, dropout_p, eps, True, backend=backend
        )
        ctx.save_for_backward(x, norm_weight, norm_bias, w1, b1, w2, mean, rstd, u, seed)
        ctx.options, ctx.backend = (scale, dropout_p), backend
        ctx.has_b1, ctx.has_b2 = b1 is not None, b2 is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dx, dnorm, dw1, db1, dw2, db2 = torch.ops.lcconformer.feed_forward_bwd(
            dout, *ctx.saved_tensors, *ctx.options, backend=ctx.backend
        )
        dnorm_weight, dnorm_bias = dnorm
        db1, db2 = db1 if ctx.has_b1 else None, db2 if ctx.has_b2 else None
        return (dx, dnorm_weight, dnorm_bias, dw1, db1, dw2, db2, None, None, None, None, None)
