"""Transformer-XL relative-position attention (Dai et al. 2019, equation 3.3; Gulati et al. 2020 for Conformers).

    S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos_{i-j}) / sqrt(D),    out = softmax(S) V

``pos`` holds the projected embeddings of the relative positions T-1 ... -(T-1) in 2T-1 rows.  The relative shift
``shifted[i, j] = raw[i, T-1-i+j]`` is a change of pitch: the same storage read with rows of 2T-2
elements from element T-1 on.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..checks import check_dropout, check_lengths, check_same, check_shape, frame_mask, readable
from ..derivatives import no_frames, refuse_transforms
from ..dropout import dropout_seed
from ..registry import forced_backend
from . import reference
from .arguments import RelposAttention, Traits
from .library import OP, RelposAttentionFn, launch_forward
from .reference import relative_shift, relpos_attention_reference

__all__ = ["OP", "RelposAttention", "Traits", "relative_shift", "relpos_attention", "relpos_attention_reference"]


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
    check_shape(OP.name, "q", q, (None,) * (4 if cu_seqlens is None else 3), letters)
    h, d = q.shape[-2:]
    check_shape(OP.name, "k", k, tuple(q.shape), letters)
    check_shape(OP.name, "v", v, tuple(q.shape), letters)
    if (pos is None) != (u is None) or (pos is None) != (v_bias is None):
        raise ValueError(f"{OP.name}: pos, u and v_bias go together; give all three, or none of them")
    if pos is not None and u is not None and v_bias is not None:
        positions = max(2 * q.shape[1] - 1, 0) if cu_seqlens is None else None
        check_shape(OP.name, "pos", pos, (positions, h, d), "[2T-1, H, D]")
        check_shape(OP.name, "u", u, (h, d), "[H, D]")
        check_shape(OP.name, "v_bias", v_bias, (h, d), "[H, D]")
    check_same(OP.name, q=q, k=k, v=v, pos=pos, u=u, v_bias=v_bias)
    if cu_seqlens is None:
        check_lengths(OP.name, lengths, q.shape[0], q.shape[1], q.device)
    else:
        _check_packed(q, pos, lengths, cu_seqlens)
    check_dropout(OP.name, dropout_p)

    if q.numel() == 0:
        return no_frames(q, k, v, pos, u, v_bias)
    if pos is None or u is None or v_bias is None:
        if forced_backend() == "torch":
            return relpos_attention_reference(q, k, v, lengths=lengths, dropout_p=dropout_p)
        return _plain_attention(q, k, v, lengths, dropout_p)
    backend = OP.choose(Traits(q.device, q.dtype, d))
    if backend == "torch":
        return reference.apply(RelposAttention(q, k, v, pos, u, v_bias, lengths, cu_seqlens, None, dropout_p))
    args = RelposAttention(q, k, v, pos, u, v_bias, lengths, cu_seqlens, dropout_seed(q, dropout_p), dropout_p).flat()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, pos, u, v_bias)):
        refuse_transforms(OP.name)
        return RelposAttentionFn.apply(*args, backend)
    out, _lse = launch_forward(*args, backend=backend)
    return out


def _check_packed(q: Tensor, pos: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor) -> None:
    if pos is None or lengths is not None:
        raise ValueError(f"{OP.name}: cu_seqlens goes with pos and without lengths, which it implies")
    if pos.shape[0] % 2 == 0 and q.shape[0]:
        raise ValueError(f"{OP.name}: pos has {pos.shape[0]} rows; expected an odd number, 2T-1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{OP.name}: cu_seqlens has dtype {cu_seqlens.dtype}; expected int64 or int32")
    check_shape(OP.name, "cu_seqlens", cu_seqlens, (None,), "[B+1]")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{OP.name}: cu_seqlens is on {cu_seqlens.device} but q is on {q.device}; move it there")
    if readable(cu_seqlens):
        ends, longest = cu_seqlens.tolist(), (pos.shape[0] + 1) // 2
        steps = [b - a for a, b in pairwise(ends)]
        if not ends or ends[0] != 0 or ends[-1] != q.shape[0] or any(not 0 <= n <= longest for n in steps):
            raise ValueError(
                f"{OP.name}: cu_seqlens is {ends}; expected 0 ... {q.shape[0]} in steps from 0 to T = {longest}"
            )


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
