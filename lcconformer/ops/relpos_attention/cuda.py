"""relpos_attention on the CUDA kernels of csrc/cuda."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcconformer import extension

from ..availability import cuda_reasons
from ..native import i64, pointer
from .arguments import RelposAttention, Traits

__all__ = ["backward", "by_warpgroups", "forward", "unsupported"]

_ELEMENTS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_HEAD_DIMS = (32, 64, 96, 128)  # as csrc/cuda/relpos_attention.h has them


def unsupported(traits: Traits) -> list[str]:
    reasons = cuda_reasons(traits.device, traits.dtype)
    if traits.dtype == torch.float32:
        reasons.append("dtype torch.float32 is not one of float16, bfloat16")
    if traits.head_dim not in _HEAD_DIMS:
        reasons.append(f"heads have D = {', '.join(map(str, _HEAD_DIMS))}, got D = {traits.head_dim}")
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


class _Inputs(NamedTuple):
    """The tensors of a call as the kernels take them, which must live until a launch, and the arguments that say so."""

    tensors: tuple[Tensor | None, ...]
    arguments: dict[str, Any]


def _inputs(kernels: Any, args: RelposAttention) -> _Inputs:
    """What forward and backward share."""
    q, k, v, pos = (_aligned(x) for x in (args.q, args.k, args.v, args.positions()[0]))
    u, v_bias = (x.contiguous() for x in args.positions()[1:])
    lengths, cu_seqlens = i64(args.lengths), i64(args.cu_seqlens)
    *frames, h, d = q.shape
    on_gpu = q.device.type == "cuda"
    arguments = {
        "element": getattr(kernels.Element, _ELEMENTS[q.dtype]),
        "batch": q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "frames": (pos.shape[0] + 1) // 2,
        "total_frames": math.prod(frames),
        "heads": h,
        "head_dim": d,
        "q": _heads(kernels, q),
        "k": _heads(kernels, k),
        "v": _heads(kernels, v),
        "pos": _heads(kernels, pos),
        "u": pointer(u),
        "v_bias": pointer(v_bias),
        "lengths": pointer(lengths),
        "cu_seqlens": pointer(cu_seqlens),
        "seed": pointer(args.seed),
        "dropout_p": args.dropout_p,
        "device": q.device.index if on_gpu else 0,
        "stream": torch.cuda.current_stream(q.device).cuda_stream if on_gpu else 0,
    }
    return _Inputs((q, k, v, pos, u, v_bias, lengths, cu_seqlens), arguments)


def by_warpgroups(device: torch.device) -> bool:
    """Whether the forward pass has a kernel for the device's own tensor cores: sm_90, in a build for it."""
    return _kernels().relpos_attention_has_warpgroups(device.index or 0)


def forward(
    args: RelposAttention, *, out: Tensor | None = None, warpgroups: bool | None = None
) -> tuple[Tensor, Tensor]:
    """``warpgroups``: by the kernel of sm_90, or not; None for where there is one."""
    kernels, q = _kernels(), args.q
    inputs = _inputs(kernels, args)
    if warpgroups is None:
        warpgroups = by_warpgroups(q.device)
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty((q.shape[-2], math.prod(q.shape[:-2])), dtype=torch.float32)
    launch = kernels.RelposAttentionForward(
        **inputs.arguments, warpgroups=warpgroups, out=pointer(out), lse=pointer(lse)
    )
    kernels.relpos_attention_forward(launch)
    return out, lse


def backward(
    dout: Tensor, args: RelposAttention, out: Tensor, lse: Tensor, *, partial: bool = False
) -> tuple[Tensor, ...]:
    """Go through a scratch of three ``[T, T]`` matrices a head, for as many heads at a time as the kernels say."""
    kernels, q = _kernels(), args.q
    inputs = _inputs(kernels, args)
    b, t, h, d = (inputs.arguments[name] for name in ("batch", "frames", "heads", "head_dim"))
    slots = kernels.relpos_attention_slots(b, t, h, d)
    parts = kernels.relpos_attention_parts(slots, t, h)
    tiles = b * -(-t // 64)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dpos = q.new_empty((parts, 2 * t - 1, h, d), dtype=torch.float32)
    du, dv_bias = (q.new_empty((n * tiles, h, d), dtype=torch.float32) for n in (1, 2))
    scratch = q.new_empty((slots, kernels.relpos_attention_scratch(t, d)))
    dout = _aligned(dout)
    launch = kernels.RelposAttentionBackward(
        **inputs.arguments,
        out=pointer(out),
        lse=pointer(lse),
        dout=_heads(kernels, dout),
        dq=pointer(dq),
        dk=pointer(dk),
        dv=pointer(dv),
        dpos=pointer(dpos),
        du=pointer(du),
        dv_bias=pointer(dv_bias),
        scratch=pointer(scratch),
        slots=slots,
        parts=parts,
    )
    kernels.relpos_attention_backward(launch)
    if partial:
        return dq, dk, dv, dpos, du, dv_bias
    # sums over the partial results: a fixed order, hence the same bits every time
    return dq, dk, dv, *(x.sum(0).to(q.dtype) for x in (dpos, du, dv_bias))
