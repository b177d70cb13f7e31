"""relpos_attention on the CPU kernels of csrc/cpu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..availability import cpu_reasons
from ..native import common, cpu_kernels, dropout, f32, i64, pointer, unit_stride
from .arguments import RelposAttention, Traits

__all__ = ["backward", "forward", "unsupported"]


def unsupported(traits: Traits) -> list[str]:
    return cpu_reasons(traits.device, traits.dtype)


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


def forward(args: RelposAttention, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    *frames, h, _ = args.q.shape
    q, k, v = (unit_stride(x) for x in (args.q, args.k, args.v))
    pos = None if args.pos is None else unit_stride(args.pos)
    u, v_bias, lengths, cu_seqlens = f32(args.u), f32(args.v_bias), i64(args.lengths), i64(args.cu_seqlens)
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((h, math.prod(frames)), dtype=torch.float32)
    inputs = _inputs(q, k, v, pos, u, v_bias, lengths, cu_seqlens, args.seed, args.dropout_p)
    cpu = cpu_kernels()
    cpu.relpos_attention_forward(cpu.RelposAttentionForward(**inputs, out=pointer(out), lse=pointer(lse)))
    return out, lse


def backward(
    dout: Tensor, args: RelposAttention, out: Tensor, lse: Tensor, *, partial: bool = False
) -> tuple[Tensor, ...]:
    given = [x for x in (args.pos, args.u, args.v_bias) if x is not None]
    dout, q, k, v = (unit_stride(x) for x in (dout, args.q, args.k, args.v))
    pos = None if args.pos is None else unit_stride(args.pos)
    u, v_bias, lengths, cu_seqlens = f32(args.u), f32(args.v_bias), i64(args.lengths), i64(args.cu_seqlens)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    shared = [x.new_empty(x.shape, dtype=torch.float32) for x in given]
    cpu = cpu_kernels()
    launch = cpu.RelposAttentionBackward(
        **_inputs(q, k, v, pos, u, v_bias, lengths, cu_seqlens, args.seed, args.dropout_p),
        out=pointer(out),
        lse=pointer(lse),
        dout=_heads(dout),
        dq=pointer(dq),
        dk=pointer(dk),
        dv=pointer(dv),
        **dict(zip(("dpos", "du", "dv_bias"), map(pointer, shared))),
    )
    cpu.relpos_attention_backward(launch)
    if partial:
        return dq, dk, dv, *(x[None] for x in shared)
    return dq, dk, dv, *(x.to(like.dtype) for x, like in zip(shared, given))
