"""relpos_attention on the Triton kernels (:mod:`lcconformer.kernels.relpos_attention`)."""

from __future__ import annotations

from torch import Tensor

from ..availability import triton_reasons
from .arguments import MAX_HEAD_DIM, RelposAttention, Traits

__all__ = ["backward", "forward", "unsupported"]


def unsupported(traits: Traits) -> list[str]:
    reasons = triton_reasons(traits.device, traits.dtype)
    if traits.head_dim > MAX_HEAD_DIM:
        reasons.append(f"heads are fused up to D = {MAX_HEAD_DIM}, got D = {traits.head_dim}")
    return reasons


def forward(args: RelposAttention, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from lcconformer.kernels import relpos_attention as kernels

    return kernels.forward(
        args.q, args.k, args.v, *args.positions(), args.lengths, args.cu_seqlens, args.seed, args.dropout_p, out
    )


def backward(
    dout: Tensor, args: RelposAttention, out: Tensor, lse: Tensor, *, partial: bool = False
) -> tuple[Tensor, ...]:
    from lcconformer.kernels import relpos_attention as kernels

    return kernels.backward(
        dout, args.q, args.k, args.v, *args.positions(), args.lengths, args.cu_seqlens, args.seed, out, lse,
        args.dropout_p, partial=partial,
    )  # fmt: skip
