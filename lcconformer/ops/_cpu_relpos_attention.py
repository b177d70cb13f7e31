"""relpos_attention on the CPU kernels; arguments and results as those of lcconformer.kernels.relpos_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._cpu import common, cpu_kernels, dropout, f32, i64, pointer, unit_stride

__all__ = ["backward", "forward"]


def _heads(x: Tensor) -> Any:
    batch_stride = x.stride(0) if x.dim() == 4 else 0
    return cpu_kernels().Heads(
        data=pointer(x), batch_stride=batch_stride, frame_stride=x.stride(-3), head_stride=x.stride(-2)
    )


def _inputs(q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p) -> dict[str, Any]:
    """Arguments that forward and backward share."""
    *frames, h, d = q.shape
    b, t = frames if cu_seqlens is None else (cu_seqlens.shape[0] - 1, (pos.shape[0] + 1) // 2)
    inputs = {
        **common(q),
        "batch": b,
        "frames": t,
        "heads": h,
        "head_dim": d,
        "total_frames": math.prod(frames),
        "q": _heads(q),
        "k": _heads(k),
        "v": _heads(v),
        "lengths": pointer(lengths),
        "cu_seqlens": pointer(cu_seqlens),
        "dropout": dropout(seed, dropout_p),
    }
    if pos is not None:
        inputs |= {"pos": pointer(pos), "pos_frame_stride": pos.stride(0), "pos_head_stride": pos.stride(1)}
        inputs |= {"u": pointer(u), "v_bias": pointer(v_bias)}
    return inputs


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    u: Tensor | None,
    v_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output, shaped like q, and the log2-sum-exp2 of the scaled scores in float32 ``[H, frames]``."""
    *frames, h, _ = q.shape
    q, k, v = (unit_stride(x) for x in (q, k, v))
    pos = None if pos is None else unit_stride(pos)
    u, v_bias, lengths, cu_seqlens = f32(u), f32(v_bias), i64(lengths), i64(cu_seqlens)
    out = q.new_empty(q.shape)
    lse = q.new_empty((h, math.prod(frames)), dtype=torch.float32)
    inputs = _inputs(q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p)
    cpu = cpu_kernels()
    cpu.relpos_attention_forward(cpu.RelposAttentionForward(**inputs, out=pointer(out), lse=pointer(lse)))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    u: Tensor | None,
    v_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, with positions, of pos, u, v_bias, in their dtypes."""
    given = () if pos is None or u is None or v_bias is None else (pos, u, v_bias)
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    pos = None if pos is None else unit_stride(pos)
    u, v_bias, lengths, cu_seqlens = f32(u), f32(v_bias), i64(lengths), i64(cu_seqlens)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    shared = [x.new_empty(x.shape, dtype=torch.float32) for x in given]
    cpu = cpu_kernels()
    args = cpu.RelposAttentionBackward(
        **_inputs(q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p),
        out=pointer(out),
        lse=pointer(lse),
        dout=_heads(dout),
        dq=pointer(dq),
        dk=pointer(dk),
        dv=pointer(dv),
        **dict(zip(("dpos", "du", "dv_bias"), map(pointer, shared))),
    )
    cpu.relpos_attention_backward(args)
    return dq, dk, dv, *(x.to(like.dtype) for x, like in zip(shared, given))
