"""Transformer-XL relative-position attention (Dai et al. 2019, equation 3.3; Gulati et al. 2020 for Conformers).

    S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos_{i-j}) / sqrt(D),    out = softmax(S) V

``pos`` holds the projected embeddings of the relative positions T-1 ... -(T-1) in 2T-1 rows.  The relative shift
``shifted[i, j] = raw[i, T-1-i+j]`` is a change of pitch: the same storage read with rows of 2T-2
elements from element T-1 on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_lengths, check_same, check_shape, frame_mask

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
    dropout_p: float = 0.0,
) -> Tensor:
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
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
    dropout_p: float = 0.0,
) -> Tensor:
    """Self-attention with relative positions (module docstring), or without (``pos=None``).

    Args:
        q, k, v: ``[B, T, H, D]``, one floating dtype.
        pos: ``[2T-1, H, D]`` projected embeddings of positions T-1 ... -(T-1); with it go
        u, v_bias: ``[H, D]`` content and position bias.
        lengths: ``[B]`` int64 number of real frames, 0 ... T; later keys are masked.  Length 0 gives zeros.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[B, T, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    check_shape(OP, "q", q, (None, None, None, None), "[B, T, H, D]")
    b, t, h, d = q.shape
    check_shape(OP, "k", k, (b, t, h, d), "[B, T, H, D]")
    check_shape(OP, "v", v, (b, t, h, d), "[B, T, H, D]")
    if (pos is None) != (u is None) or (pos is None) != (v_bias is None):
        raise ValueError(f"{OP}: pos, u and v_bias go together; give all three, or none of them")
    if pos is not None and u is not None and v_bias is not None:
        check_shape(OP, "pos", pos, (max(2 * t - 1, 0), h, d), "[2T-1, H, D]")
        check_shape(OP, "u", u, (h, d), "[H, D]")
        check_shape(OP, "v_bias", v_bias, (h, d), "[H, D]")
    check_same(OP, q=q, k=k, v=v, pos=pos, u=u, v_bias=v_bias)
    check_lengths(OP, lengths, b, t, q.device)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    return relpos_attention_reference(q, k, v, pos, u, v_bias, lengths=lengths, dropout_p=dropout_p)
