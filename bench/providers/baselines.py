"""The baseline: a plain Conformer in eager PyTorch without weight sharing, written as a good engineer would write it.

Nothing is slow on purpose: one projection gives queries, keys and values, pointwise convolutions are linear layers, each
forward computes the sinusoids once, and without padding there is no mask.  The relative shift is the usual pad and view.
Parameters have the names of :class:`lcconformer.ConformerLayer`.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcconformer.ops.glu_depthwise_conv.reference import depthwise_conv1d

__all__ = [
    "Conformer",
    "ConformerLayer",
    "quantized",
    "relative_attention",
    "relative_attention_in_blocks",
    "sdpa_relative_attention",
    "shift",
    "sinusoids",
]


def sinusoids(frames: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids ``[2T-1, width]`` of the positions T-1 ... -(T-1), sin and cos interleaved, in the dtype of ``like``."""
    work = torch.float64 if like.dtype == torch.float64 else torch.float32
    position = torch.arange(frames - 1, -frames, -1, device=like.device, dtype=work)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=work) * (-math.log(10000.0) / width))
    angle = position[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(like.dtype)


def shift(x: Tensor) -> Tensor:
    """Relative shift ``[B, H, T, 2T-1] -> [B, H, T, T]`` by the pad and view of Transformer-XL."""
    b, h, t, length = x.shape
    x = F.pad(x, (1, 0)).view(b, h, length + 1, t)
    return x[:, :, 1:].view(b, h, t, length)[..., :t]


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, u: Tensor | None, v_bias: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """Attention that keeps its scores in memory.

    Args:
        q, k, v: ``[B, T, H, D]``.
        pos, u, v_bias: projected positions ``[2T-1, H, D]`` and biases ``[H, D]``; all None without relative positions.
        dropout_p: rate on the probabilities.

    Returns:
        ``[B, T, H, D]``.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if pos is None or u is None or v_bias is None:
        scores = q @ k.transpose(-1, -2)
    else:
        scores = (q + u[:, None]) @ k.transpose(-1, -2)
        scores = scores + shift((q + v_bias[:, None]) @ pos.permute(1, 2, 0))
    probs = F.dropout((scores / math.sqrt(q.shape[-1])).softmax(-1), dropout_p)
    return (probs @ v).transpose(1, 2)


def relative_attention_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    u: Tensor | None,
    v_bias: Tensor | None,
    dropout_p: float = 0.0,
    *,
    block: int = 256,
) -> Tensor:
    """The same with the scores of ``block`` queries in memory: a reference for long audio."""
    outputs, frames = [], q.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    for first in range(0, frames, block):
        part = q[:, first : first + block].transpose(1, 2)  # [B, H, Q, D]
        n = part.shape[2]
        if pos is None or u is None or v_bias is None:
            scores = part @ k.transpose(-1, -2)
        else:
            # of the positions first + n - 1 ... first - (T-1); query i sees key j in column n - 1 - i + j
            near = pos[frames - first - n : 2 * frames - 1 - first].permute(1, 2, 0)  # [H, D, T + n - 1]
            raw = (part + v_bias[:, None]) @ near
            scores = (part + u[:, None]) @ k.transpose(-1, -2)
            scores = scores + torch.stack([raw[:, :, i, n - 1 - i : n - 1 - i + frames] for i in range(n)], 2)
        probs = F.dropout((scores / math.sqrt(q.shape[-1])).softmax(-1), dropout_p)
        outputs.append((probs @ v).transpose(1, 2))
    return torch.cat(outputs, 1)


def sdpa_relative_attention(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, u: Tensor | None, v_bias: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """The same by ``scaled_dot_product_attention``, with the position scores as additive bias."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    bias = None
    if pos is not None and u is not None and v_bias is not None:
        bias = shift((q + v_bias[:, None]) @ pos.permute(1, 2, 0)) / math.sqrt(q.shape[-1])
        q = q + u[:, None]
    pinned: contextlib.AbstractContextManager = contextlib.nullcontext()
    if q.is_cuda:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # with a bias cuDNN's backward can give NaN; falling back to the math backend silently would not measure SDPA
        pinned = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    with pinned:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p).transpose(1, 2)


class FeedForward(nn.Module):
    """``x + 1/2 drop(W2 drop(silu(W1 LN(x))))``."""

    def __init__(self, d_model: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, ffn_dim)
        self.down = nn.Linear(ffn_dim, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.drop(self.down(self.drop(F.silu(self.up(self.norm(x))))))


class Attention(nn.Module):
    """``x + drop(MHSA(LN(x)))``, with relative positions or without."""

    def __init__(self, d_model: int, num_heads: int, dropout: float, position: str, attention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.drop = nn.Dropout(dropout)
        self.split = (num_heads, d_model // num_heads)
        self.attention = attention
        self.relative = position == "relative"
        if self.relative:
            self.pos = nn.Linear(d_model, d_model, bias=False)
            self.u = nn.Parameter(torch.zeros(self.split))
            self.v_bias = nn.Parameter(torch.zeros(self.split))

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, self.split) for t in self.qkv(self.norm(x)).chunk(3, -1))
        relative: tuple = (None, None, None)
        if self.relative:
            relative = (self.pos(table).unflatten(-1, self.split), self.u.to(q.dtype), self.v_bias.to(q.dtype))
        y = self.attention(q, k, v, *relative, dropout_p=self.drop.p if self.training else 0.0)
        return x + self.drop(self.out(y.flatten(-2)))


class Convolution(nn.Module):
    """``x + drop(pw2(silu(norm(depthwise(glu(pw1(LN(x))))))))``."""

    def __init__(self, d_model: int, kernel: int, dropout: float, conv_norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.pointwise1 = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel, padding=kernel // 2, groups=d_model)
        self.batch = conv_norm == "batch"
        self.depthwise_norm = nn.BatchNorm1d(d_model) if self.batch else nn.LayerNorm(d_model)
        self.pointwise2 = nn.Linear(d_model, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.pointwise1(self.norm(x)), -1).transpose(1, 2)
        y = depthwise_conv1d(y, self.depthwise.weight[:, 0], self.depthwise.bias)  # [B, C, T]
        y = self.depthwise_norm(y).transpose(1, 2) if self.batch else self.depthwise_norm(y.transpose(1, 2))
        return x + self.drop(self.pointwise2(F.silu(y)))


class ConformerLayer(nn.Module):
    """One Conformer layer: ``[B, T, d_model] -> [B, T, d_model]``."""

    def __init__(self, d_model, num_heads, ffn_dim, kernel, dropout, position, conv_norm, attention) -> None:
        super().__init__()
        self.ffn1 = FeedForward(d_model, ffn_dim, dropout)
        self.attention = Attention(d_model, num_heads, dropout, position, attention)
        self.conv = Convolution(d_model, kernel, dropout, conv_norm)
        self.ffn2 = FeedForward(d_model, ffn_dim, dropout)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        x = self.attention(self.ffn1(x), table)
        return self.norm(self.ffn2(self.conv(x)))


class Conformer(nn.Module):
    """Conformer encoder without weight sharing: ``[B, T, d_model] -> [B, T, d_model]``.

    Args:
        d_model, num_heads, ffn_dim, num_layers, kernel: sizes, as in :class:`lcconformer.ConformerConfig`.
        dropout: rate at every site, in training.
        position: ``"relative"`` or ``"none"``.
        conv_norm: ``"layer"`` or ``"batch"``.
        attention: :func:`relative_attention` or :func:`sdpa_relative_attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        kernel: int = 31,
        dropout: float = 0.1,
        position: str = "relative",
        conv_norm: str = "layer",
        attention=relative_attention,
    ) -> None:
        super().__init__()
        self.position = position
        self.layers = nn.ModuleList(
            ConformerLayer(d_model, num_heads, ffn_dim, kernel, dropout, position, conv_norm, attention)
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        table = sinusoids(x.shape[1], x.shape[2], x) if self.position == "relative" else None
        for layer in self.layers:
            x = layer(x, table)
        return x


def quantized(model: nn.Module) -> nn.Module:
    """Return a copy by PyTorch's dynamic quantization: weights of linear maps in int8, what comes in rounded at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to move to torchao
        return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
