"""feed_forward on the Triton kernels (:mod:`lcconformer.kernels.feed_forward`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..availability import triton_reasons
from ..residual_layer_norm.arguments import MAX_WIDTH
from .arguments import FeedForward, Traits

__all__ = ["backward", "forward", "unsupported", "up", "up_backward"]


def unsupported(traits: Traits) -> list[str]:
    reasons = triton_reasons(traits.device, traits.dtype)
    if traits.activation != "silu":
        reasons.append(f"activation {traits.activation!r} is not fused, only 'silu' is")
    if traits.width > MAX_WIDTH:
        reasons.append(f"a row is fused up to D = {MAX_WIDTH}, got D = {traits.width}")
    if torch.float64 in (traits.norm_dtype, traits.weight_dtype):
        reasons.append("a weight is float64")
    return reasons


def forward(args: FeedForward, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lcconformer.kernels import feed_forward as kernels

    return kernels.forward(
        args.x, args.norm_weight, args.norm_bias, args.w1, args.b1, args.w2, args.b2, args.seed, args.scale, args.dropout_p,
        args.eps, save,
    )  # fmt: skip


def backward(
    dout: Tensor, args: FeedForward, mean: Tensor, rstd: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lcconformer.kernels import feed_forward as kernels

    return kernels.backward(
        dout, args.x, args.norm_weight, args.norm_bias, args.w1, args.b1, args.w2, mean, rstd, u, args.seed, args.scale,
        args.dropout_p,
    )  # fmt: skip


def up(
    h: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str
) -> tuple[Tensor, Tensor]:
    from lcconformer.kernels import feed_forward as kernels

    u, g = kernels.up(h, w1, b1, seed, dropout_p)
    assert u is not None
    return u, g


def up_backward(
    dz: Tensor,
    w2: Tensor,
    u: Tensor,
    b1: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
    *,
    du: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from lcconformer.kernels import feed_forward as kernels

    return kernels.up_backward(dz, w2, u, b1, seed, dropout_p, du, g)
