"""residual_layer_norm on the Triton kernels (:mod:`lcconformer.kernels.residual_layer_norm`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..availability import triton_reasons
from .arguments import MAX_WIDTH, ResidualLayerNorm, Traits

__all__ = ["backward", "forward", "layer_norm", "layer_norm_backward", "unsupported"]


def unsupported(traits: Traits) -> list[str]:
    reasons = triton_reasons(traits.device, traits.dtype)
    if traits.width > MAX_WIDTH:
        reasons.append(f"a row is fused up to D = {MAX_WIDTH}, got D = {traits.width}")
    if traits.weight_dtype == torch.float64:
        reasons.append("weight is float64")
    return reasons


def forward(args: ResidualLayerNorm, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lcconformer.kernels import residual_layer_norm as kernels

    return kernels.forward(
        args.x, args.y, args.weight, args.bias, args.seed, args.alpha, args.dropout_p, args.eps, dtype
    )  # fmt: skip


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
    from lcconformer.kernels import residual_layer_norm as kernels

    return kernels.backward(ds, dn, s, mean, rstd, weight, seed, alpha, dropout_p)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from lcconformer.kernels import residual_layer_norm as kernels

    return kernels.layer_norm(x, weight, bias, eps, dtype)


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
    from lcconformer.kernels import residual_layer_norm as kernels

    # the kernel casts as it reads and writes
    return kernels.layer_norm_backward(
        dn, ds, s, mean, rstd, weight, bias, n=n, dy=dy, seed=seed, alpha=alpha, dropout_p=dropout_p
    )
