"""relpos_attention on the CUDA kernel of csrc/cuda; the backward pass is Triton's, of what the forward has kept."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lcconformer import extension

from ..availability import cuda_reasons
from ..native import i64, pointer
from . import triton
from .arguments import RelposAttention, Traits

__all__ = ["backward", "forward", "unsupported"]

_ELEMENTS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_HEAD_DIMS = (32, 64, 96, 128)  # as csrc/cuda/relpos_attention.h has them


def unsupported(traits: Traits) -> list[str]:
    reasons = cuda_reasons(traits.device, traits.dtype)
    if traits.dtype == torch.float32:
        reasons.append("dtype torch.float32 is not one of float16, bfloat16")
    if traits.head_dim not in _HEAD_DIMS:
        reasons.append(f"heads have D = {', '.join(map(str, _HEAD_DIMS))}, got D = {traits.head_dim}")
    reasons += [f"the backward pass is Triton's: {reason}" for reason in triton.unsupported(traits)]
    return reasons


def _kernels() -> ModuleType:
    return extension.load().cuda


def _aligned(x: Tensor) -> Tensor:
    """The kernel copies sixteen bytes at a time: rows start at multiples of that, with unit stride."""
    whole = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _heads(kernels: Any, x: Tensor) -> Any:
    batch_stride = x.stride(0) if x.dim() == 4 else 0
    return kernels.RelposHeads(
        data=pointer(x), batch_stride=batch_stride, frame_stride=x.stride(-3), head_stride=x.stride(-2)
    )


def forward(args: RelposAttention, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    q, k, v, pos = (_aligned(x) for x in (args.q, args.k, args.v, args.positions()[0]))
    u, v_bias = (x.contiguous() for x in args.positions()[1:])
    lengths, cu_seqlens = i64(args.lengths), i64(args.cu_seqlens)
    *frames, h, d = q.shape
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((h, math.prod(frames)), dtype=torch.float32)
    on_gpu = q.device.type == "cuda"
    launch = kernels.RelposAttentionForward(
        element=getattr(kernels.Element, _ELEMENTS[q.dtype]),
        batch=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        frames=(pos.shape[0] + 1) // 2,
        total_frames=math.prod(frames),
        heads=h,
        head_dim=d,
        q=_heads(kernels, q),
        k=_heads(kernels, k),
        v=_heads(kernels, v),
        pos=_heads(kernels, pos),
        u=pointer(u),
        v_bias=pointer(v_bias),
        lengths=pointer(lengths),
        cu_seqlens=pointer(cu_seqlens),
        seed=pointer(args.seed),
        dropout_p=args.dropout_p,
        out=pointer(out),
        lse=pointer(lse),
        device=q.device.index if on_gpu else 0,
        stream=torch.cuda.current_stream(q.device).cuda_stream if on_gpu else 0,
    )
    kernels.relpos_attention_forward(launch)
    return out, lse


backward = triton.backward
