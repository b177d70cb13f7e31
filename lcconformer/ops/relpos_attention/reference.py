"""relpos_attention in plain PyTorch: the oracle of every kernel, and the fallback."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import frame_mask
from ..dropout import drawn_from
from .arguments import RelposAttention, Traits

__all__ = ["apply", "backward", "forward", "relative_shift", "relpos_attention_reference", "unsupported"]


def relative_shift(x: Tensor) -> Tensor:
    """``[..., T, 2T-1] -> [..., T, T]`` with ``out[i, j] = x[i, T-1-i+j]``: a view of contiguous scores, a copy in exports."""
    t = x.shape[-2]
    lead = x.shape[:-2]
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # ONNX knows no memory: its as_strided would index the elements of the slice, not the storage beneath them; and
        # torch.jit.trace would take sizes and strides for constants
        x = F.pad(x, (1, 0)).flatten(-2)[..., t:]  # [..., T (2T-1)]
        return x.reshape(*lead, t, 2 * t - 1)[..., :t]
    x = x.contiguous()
    flat = x.reshape(*lead, t * (2 * t - 1))[..., t - 1 :]
    # rows of pitch 2T-2 starting at T-1: no pad, no gather, and the backward is the same view
    return flat.as_strided((*lead, t, t), (*flat.stride()[:-1], 2 * t - 2, 1))


def relpos_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None = None,
    u: Tensor | None = None,
    v_bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Differentiable attention with the signature of :func:`~lcconformer.ops.relpos_attention`."""
    if cu_seqlens is not None and pos is not None:
        frame = torch.arange(q.shape[0], device=q.device)
        row = torch.bucketize(frame, cu_seqlens[1:], right=True)  # utterance of each frame
        padded = cu_seqlens[:-1, None] + torch.arange((pos.shape[0] + 1) // 2, device=q.device)  # [B, T]
        q, k, v = (x[padded.clamp(max=q.shape[0] - 1)] for x in (q, k, v))  # [B, T, H, D]
        out = relpos_attention_reference(q, k, v, pos, u, v_bias, lengths=cu_seqlens.diff(), dropout_p=dropout_p)
        return out[row, frame - cu_seqlens[row]]
    scale = 1.0 / math.sqrt(q.shape[-1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if pos is None or u is None or v_bias is None:
        scores = q @ k.transpose(-1, -2)
    else:
        content = (q + u[:, None]) @ k.transpose(-1, -2)  # [B, H, T, T]
        position = (q + v_bias[:, None]) @ pos.permute(1, 2, 0)  # [B, H, T, 2T-1]
        scores = content + relative_shift(position)
    scores = scores * scale
    if lengths is None:
        probs = scores.softmax(-1)
    else:
        pad = ~frame_mask(lengths, q.shape[2])[:, None, None]  # [B, 1, 1, T]
        # the second fill turns the NaN or uniform rows of an utterance without frames into zeros
        probs = scores.masked_fill(pad, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(pad, 0.0)
    probs = F.dropout(probs, dropout_p)
    return (probs @ v).transpose(1, 2)


def apply(args: RelposAttention) -> Tensor:
    """Run the differentiable reference; dropout draws from PyTorch's generator."""
    return relpos_attention_reference(
        args.q, args.k, args.v, args.pos, args.u, args.v_bias,
        lengths=args.lengths, cu_seqlens=args.cu_seqlens, dropout_p=args.dropout_p,
    )  # fmt: skip


def unsupported(traits: Traits) -> list[str]:
    return []


def forward(args: RelposAttention, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with drawn_from(args.seed):
        attended = apply(args)
    return attended.contiguous() if out is None else out.copy_(attended), args.q.new_empty((0,))


def backward(
    dout: Tensor, args: RelposAttention, out: Tensor, lse: Tensor, *, partial: bool = False
) -> tuple[Tensor, ...]:
    """Recompute the forward under autograd."""
    inputs = {n: getattr(args, n) for n in ("q", "k", "v", "pos", "u", "v_bias") if getattr(args, n) is not None}
    leaves: dict[str, Any] = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    with torch.enable_grad(), drawn_from(args.seed):
        recomputed = apply(dataclasses.replace(args, **leaves))
    dq, dk, dv, *shared = torch.autograd.grad(recomputed, list(leaves.values()), dout)
    return dq, dk, dv, *(x[None] if partial else x for x in shared)
