"""The Conformer layer (Gulati et al. 2020) as modules over :mod:`lcconformer.ops`.

x = x + 1/2 drop(FFN1(LN(x)))
x = x + drop(MHSA(LN(x)))
x = x + drop(Conv(LN(x)))
x = x + 1/2 drop(FFN2(LN(x)))
x = LN(x)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .config import ConformerConfig
from .positions import apply_rotary, relative_sinusoids, rotary_tables

__all__ = ["ConformerLayer", "ConvModule", "FeedForward", "Positions", "RelativeAttention"]

# what a layer needs to know of positions: projected embeddings [2T-1, H, D], or rotary (cos, sin), or nothing
Positions = Tensor | tuple[Tensor, Tensor] | None


class FeedForward(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: pre-norm, half-step feed-forward with its residual."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.d_model, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.d_model)
        self.activation = config.activation
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return ops.feed_forward(
            x,
            self.norm.weight,
            self.norm.bias,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            scale=0.5,
            activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
            eps=self.norm.eps,
        )


class RelativeAttention(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: multi-head self-attention of normalised input, with the config's positions."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d, self.heads = config.d_model, config.num_heads
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=config.attention_bias)
        self.out = nn.Linear(d, d, bias=config.attention_bias)
        self.position = config.position
        self.rotary_input = config.rotary_input
        self.dropout = config.dropout
        if config.position == "relative":
            self.pos = nn.Linear(d, d, bias=False)
            self.u = nn.Parameter(torch.zeros(self.heads, d // self.heads))
            self.v_bias = nn.Parameter(torch.zeros(self.heads, d // self.heads))

    def positions(self, x: Tensor) -> Positions:
        """What :meth:`forward` needs for ``x [B, T, d_model]``; the same for all loops of this layer."""
        frames, d = x.shape[1], x.shape[2]
        if self.position == "relative":
            table = relative_sinusoids(frames, d, device=x.device, dtype=self.pos.weight.dtype)
            return self.pos(table).unflatten(-1, (self.heads, d // self.heads))
        if self.position == "rotary":
            return rotary_tables(frames, d // self.heads, device=x.device, dtype=self.qkv.weight.dtype)
        return None

    def forward(self, h: Tensor, lengths: Tensor | None, positions: Positions) -> Tensor:
        d = h.shape[-1]
        split = (self.heads, d // self.heads)
        rotary = positions if isinstance(positions, tuple) else None
        if rotary is not None and self.rotary_input == "hidden":
            # queries and keys see rotated hidden states, values plain ones
            rotated = apply_rotary(h.unflatten(-1, split), *rotary).flatten(-2)
            weight, bias = self.qkv.weight, self.qkv.bias
            qk = F.linear(rotated, weight[: 2 * d], None if bias is None else bias[: 2 * d])
            v = F.linear(h, weight[2 * d :], None if bias is None else bias[2 * d :])
            q, k = qk.chunk(2, -1)
        else:
            q, k, v = self.qkv(h).chunk(3, -1)  # each [B, T, d_model]
        q, k, v = (t.unflatten(-1, split) for t in (q, k, v))  # [B, T, H, D]
        if rotary is not None and self.rotary_input == "query_key":
            cos, sin = (t.to(q.dtype) for t in rotary)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        dropout_p = self.dropout if self.training else 0.0
        if isinstance(positions, Tensor):
            u, v_bias = self.u.to(q.dtype), self.v_bias.to(q.dtype)
            o = ops.relpos_attention(q, k, v, positions.to(q.dtype), u, v_bias, lengths=lengths, dropout_p=dropout_p)
        else:
            o = ops.relpos_attention(q, k, v, lengths=lengths, dropout_p=dropout_p)
        return self.out(o.flatten(-2))


class ConvModule(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: pointwise, GLU, depthwise, norm, activation, pointwise, of normalised input."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d, k = config.d_model, config.conv_kernel_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.pointwise1 = nn.Linear(d, 2 * d, bias=config.conv_bias)
        # the modules below hold parameters; the op does the work
        self.depthwise = nn.Conv1d(d, d, k, padding=k // 2, groups=d, bias=config.conv_bias)
        self.depthwise_norm: nn.Module
        if config.conv_norm == "layer":
            self.depthwise_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        elif config.conv_norm == "batch":
            self.depthwise_norm = nn.BatchNorm1d(d, eps=config.layer_norm_eps)
        elif config.conv_norm == "group":
            self.depthwise_norm = nn.GroupNorm(config.conv_norm_groups, d, eps=config.layer_norm_eps)
        else:
            self.depthwise_norm = nn.Identity()
        self.pointwise2 = nn.Linear(d, d, bias=config.conv_bias)
        self.config = config

    def forward(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        config, norm = self.config, self.depthwise_norm
        y = self.pointwise1(h)  # [B, T, 2 d_model]
        if isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked is not None and self.training:
            norm.num_batches_tracked.add_(1)
        bias = self.depthwise.bias
        y = ops.glu_depthwise_conv(
            y,
            self.depthwise.weight[:, 0].to(y.dtype),
            None if bias is None else bias.to(y.dtype),
            lengths=lengths if config.padding == "masked" else None,
            norm=config.conv_norm,
            norm_weight=getattr(norm, "weight", None),
            norm_bias=getattr(norm, "bias", None),
            running_mean=getattr(norm, "running_mean", None),
            running_var=getattr(norm, "running_var", None),
            num_groups=config.conv_norm_groups,
            training=self.training,
            eps=config.layer_norm_eps,
            activation=config.activation,
        )
        return self.pointwise2(y)


class ConformerLayer(nn.Module):
    """One Conformer layer.

    ``forward(x [B, T, d_model], lengths [B] or None, positions=None) -> [B, T, d_model]``.  ``positions`` are those of
    :meth:`positions`; a loop computes them once, and a single call may leave them out.

    Args:
        config: the layer uses the width, heads, kernel, norms, positions, dropout and padding of it.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.ffn1 = FeedForward(config)
        self.attention = RelativeAttention(config)
        self.conv = ConvModule(config)
        self.ffn2 = FeedForward(config)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.convolution_first = config.convolution_first
        self.dropout = config.dropout

    def positions(self, x: Tensor) -> Positions:
        """Positions for inputs like ``x [B, T, d_model]``, to be passed to every call of :meth:`forward`."""
        return self.attention.positions(x)

    def forward(self, x: Tensor, lengths: Tensor | None = None, positions: Positions = None) -> Tensor:
        if positions is None:
            positions = self.positions(x)
        x = self.ffn1(x)
        first, second = self.attention, self.conv
        h = first.norm(x) if not self.convolution_first else second.norm(x)
        dropout_p = self.dropout if self.training else 0.0
        if self.convolution_first:
            y, following = second(h, lengths), first.norm
        else:
            y, following = first(h, lengths, positions), second.norm
        x, h = ops.residual_layer_norm(
            x, y.to(x.dtype), following.weight, following.bias, dropout_p=dropout_p, eps=following.eps
        )
        y = first(h, lengths, positions) if self.convolution_first else second(h, lengths)
        x = x + F.dropout(y, dropout_p, self.training).to(x.dtype)
        return self.norm(self.ffn2(x))
