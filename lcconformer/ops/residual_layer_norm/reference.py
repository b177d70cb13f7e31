"""residual_layer_norm in plain PyTorch: the oracle of every kernel, and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import drawn_from
from .arguments import ResidualLayerNorm, Traits

__all__ = [
    "apply",
    "backward",
    "forward",
    "layer_norm",
    "layer_norm_backward",
    "residual_layer_norm_reference",
    "unsupported",
]


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
    """Differentiable ``(s, LN(s))`` with the signature of :func:`~lcconformer.ops.residual_layer_norm`."""
    s = x + alpha * F.dropout(y, dropout_p)
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps)


def apply(args: ResidualLayerNorm) -> tuple[Tensor, Tensor]:
    """Run the differentiable reference; dropout draws from PyTorch's generator."""
    return residual_layer_norm_reference(
        args.x, args.y, args.weight, args.bias, alpha=args.alpha, dropout_p=args.dropout_p, eps=args.eps
    )


def unsupported(traits: Traits) -> list[str]:
    return []


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return n.to(dtype), mean.flatten(), rstd.flatten()


def forward(args: ResidualLayerNorm, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with drawn_from(args.seed):
        s = args.x.contiguous() + args.alpha * F.dropout(args.y.to(args.x.dtype), args.dropout_p)
    return s, *layer_norm(s, args.weight, args.bias, args.eps, dtype or s.dtype)


def layer_norm_backward(
    dn: Tensor,
    ds: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    n: Tensor | None = None,
    dy: Tensor | None = None,
    alpha: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dx, dparams, normal = _gradients(dn.to(s.dtype), ds, s, mean, rstd, weight)
    if n is not None:
        n.copy_(normal * weight + bias)
    if dy is not None:
        branch = _branch(dx, seed, alpha, dropout_p, dy.dtype)
        dy.copy_(dx if branch is None else branch)
    return dx, dparams[None]


def backward(
    ds: Tensor,
    dn: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    alpha: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d = s.shape[-1]
    dx, dparams, _ = _gradients(dn.reshape(-1, d), ds.reshape(-1, d), s.reshape(-1, d), mean, rstd, weight)
    dx = dx.view(s.shape)
    dy = _branch(dx, seed, alpha, dropout_p, s.dtype)
    return dx, s.new_empty((0,)) if dy is None else dy, dparams


def _gradients(dn, ds, s, mean, rstd, weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, (dweight, dbias) ``[2, D]``, s normalised) of rows."""
    mean, rstd = mean[:, None], rstd[:, None]
    normal = (s - mean) * rstd
    scaled = dn * weight
    dx = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    dparams = torch.stack(((dn * normal).sum(0), dn.sum(0))).to(weight.dtype)
    return (dx * rstd + ds).to(s.dtype), dparams, normal


def _branch(dx: Tensor, seed: Tensor | None, alpha: float, dropout_p: float, dtype: torch.dtype) -> Tensor | None:
    if alpha == 1.0 and seed is None:
        return None
    with drawn_from(seed):
        return F.dropout(alpha * dx, dropout_p).to(dtype)
