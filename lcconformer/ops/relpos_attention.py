"""Transformer-XL relative-position attention (Dai et al. 2019, equation 3.3; Gulati et al. 2020 for Conformers).

    S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos_{i-j}) / sqrt(D),    out = softmax(S) V

``pos`` holds the projected embeddings of the relative positions T-1 ... -(T-1) in 2T-1 rows.  The relative shift
``shifted[i, j] = raw[i, T-1-i+j]`` is a change of pitch: the same storage read with rows of 2T-2
elements from element T-1 on.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ._backend import forced_backend, select
from ._checks import check_lengths, check_same, check_shape, frame_mask
from ._cpu import cpu_reasons
from ._fused import fused_kernels
from ._triton import dropout_seed, triton_reasons

__all__ = ["relative_shift", "relpos_attention", "relpos_attention_reference"]

OP = "relpos_attention"


def relative_shift(x: Tensor) -> Tensor:
    """``[..., T, 2T-1] -> [..., T, T]`` with ``out[i, j] = x[i, T-1-i+j]``, a view of contiguous scores."""
    t = x.shape[-2]
    x = x.contiguous()
    lead = x.shape[:-2]
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
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
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
    probs = torch.nn.functional.dropout(probs, dropout_p)
    return (probs @ v).transpose(1, 2)


def relpos_attention(
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
    """Self-attention with relative positions (module docstring), or without (``pos=None``).

    Args:
        q, k, v: ``[B, T, H, D]``, one floating dtype.
        pos: ``[2T-1, H, D]`` projected embeddings of positions T-1 ... -(T-1); with it go
        u, v_bias: ``[H, D]`` content and position bias.
        lengths: ``[B]`` int64 number of real frames, 0 ... T; later keys are masked.  Length 0 gives zeros.
        cu_seqlens: ``[B+1]`` int64 or int32; utterance b is the frames ``cu_seqlens[b] ... cu_seqlens[b+1]-1`` of q, k,
            v, which are then packed, ``[frames, H, D]``; T is that of ``pos``, which a shorter utterance uses the
            middle of.  Not together with ``lengths``; only with ``pos``.
        dropout_p: probability of dropping an attention weight.

    Returns:
        shaped like ``q``, in its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    letters = "[B, T, H, D]" if cu_seqlens is None else "[frames, H, D]"
    check_shape(OP, "q", q, (None,) * (4 if cu_seqlens is None else 3), letters)
    h, d = q.shape[-2:]
    check_shape(OP, "k", k, tuple(q.shape), letters)
    check_shape(OP, "v", v, tuple(q.shape), letters)
    if (pos is None) != (u is None) or (pos is None) != (v_bias is None):
        raise ValueError(f"{OP}: pos, u and v_bias go together; give all three, or none of them")
    if pos is not None and u is not None and v_bias is not None:
        positions = max(2 * q.shape[1] - 1, 0) if cu_seqlens is None else None
        check_shape(OP, "pos", pos, (positions, h, d), "[2T-1, H, D]")
        check_shape(OP, "u", u, (h, d), "[H, D]")
        check_shape(OP, "v_bias", v_bias, (h, d), "[H, D]")
    check_same(OP, q=q, k=k, v=v, pos=pos, u=u, v_bias=v_bias)
    if cu_seqlens is None:
        check_lengths(OP, lengths, q.shape[0], q.shape[1], q.device)
    else:
        _check_packed(q, pos, lengths, cu_seqlens)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")

    if q.numel() == 0:
        return _empty(q, k, v, pos, u, v_bias)
    if pos is None or u is None or v_bias is None:
        if forced_backend() == "torch":
            return relpos_attention_reference(q, k, v, lengths=lengths, dropout_p=dropout_p)
        return _plain_attention(q, k, v, lengths, dropout_p)
    backend = backend_of(q)
    if backend == "torch":
        return relpos_attention_reference(
            q, k, v, pos, u, v_bias, lengths=lengths, cu_seqlens=cu_seqlens, dropout_p=dropout_p
        )
    tensors = (q, k, v, pos, u, v_bias, lengths, cu_seqlens, dropout_seed(q, dropout_p))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return RelposAttentionFn.apply(*tensors, dropout_p, backend)
    out, _lse = torch.ops.lcconformer.relpos_attention_fwd(*tensors, dropout_p, backend=backend)
    return out


def _check_packed(q: Tensor, pos: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor) -> None:
    if pos is None or lengths is not None:
        raise ValueError(f"{OP}: cu_seqlens goes with pos and without lengths, which it implies")
    if pos.shape[0] % 2 == 0:
        raise ValueError(f"{OP}: pos has {pos.shape[0]} rows; expected an odd number, 2T-1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{OP}: cu_seqlens has dtype {cu_seqlens.dtype}; expected int64 or int32")
    check_shape(OP, "cu_seqlens", cu_seqlens, (None,), "[B+1]")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{OP}: cu_seqlens is on {cu_seqlens.device} but q is on {q.device}; move it there")
    # values only where looking at them costs no synchronisation, as for lengths
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        ends, longest = cu_seqlens.tolist(), (pos.shape[0] + 1) // 2
        steps = [b - a for a, b in pairwise(ends)]
        if not ends or ends[0] != 0 or ends[-1] != q.shape[0] or any(not 0 <= n <= longest for n in steps):
            raise ValueError(
                f"{OP}: cu_seqlens is {ends}; expected 0 ... {q.shape[0]} in steps from 0 to T = {longest}"
            )


def _empty(*tensors: Tensor | None) -> Tensor:
    """No frames in, no frames out; every input still gets its gradient of zeros."""
    q, *others = (x for x in tensors if x is not None)
    for x in others:
        q = q + 0.0 * x.sum()
    return q.clone()


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout_p: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    mask = None
    if lengths is not None:
        # an utterance without frames looks at its first one, and is zeroed below: no row is ever empty
        mask = frame_mask(lengths.clamp(min=1), q.shape[2])[:, None, None]  # [B, 1, 1, T]
    # not cuDNN's: with a mask its gradients can be NaN (pytorch#196678)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = scaled_dot_product_attention(q, k, v, mask, dropout_p)
    if lengths is not None:
        out = out.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return out.transpose(1, 2)


# --- fused -----------------------------------------------------------------------------------------------------------


def backend_of(q: Tensor) -> str:
    """The backend that serves these inputs; of their values nothing is used."""
    return select(OP, q.device.type, {"triton": lambda: _triton_unsupported(q), "cpu": lambda: cpu_reasons(q)})


def _triton_unsupported(q: Tensor) -> list[str]:
    reasons = triton_reasons(q)
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"heads are fused up to D = {MAX_HEAD_DIM}, got D = {q.shape[-1]}")
    return reasons


# a program holds whole rows of a head
MAX_HEAD_DIM = 128

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor pos, Tensor u, Tensor v_bias, Tensor? lengths, "
_INPUTS += "Tensor? cu_seqlens, Tensor? seed"
torch.library.define(
    "lcconformer::relpos_attention_fwd",
    f"({_INPUTS}, float dropout_p, *, str backend='triton') -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "lcconformer::relpos_attention_bwd",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, float dropout_p, *, str backend='triton') "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dpos, Tensor du, Tensor dv_bias)",
)


@torch.library.impl("lcconformer::relpos_attention_fwd", ("CPU", "CUDA"))
def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).forward(*args)


@torch.library.impl("lcconformer::relpos_attention_bwd", ("CPU", "CUDA"))
def _bwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).backward(*args)


@torch.library.register_fake("lcconformer::relpos_attention_fwd")
def _fwd_fake(q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p, *, backend="triton"):
    *frames, h, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((h, math.prod(frames)), dtype=torch.float32)


@torch.library.register_fake("lcconformer::relpos_attention_bwd")
def _bwd_fake(dout, q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, out, lse, dropout_p, *, backend="triton"):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, pos, u, v_bias))


class RelposAttentionFn(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp of each row; weights and dropout come again from those."""

    @staticmethod
    def forward(ctx, q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p, backend):
        inputs = (q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed)
        out, lse = torch.ops.lcconformer.relpos_attention_fwd(*inputs, dropout_p, backend=backend)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        grads = torch.ops.lcconformer.relpos_attention_bwd(dout, *ctx.saved_tensors, ctx.dropout_p, backend=ctx.backend)
        return *grads, None, None, None, None, None
