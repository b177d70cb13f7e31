"""The Conformer layer (Gulati et al. 2020) as modules over :mod:`lcconformer.ops`.

x = x + 1/2 drop(FFN1(LN(x)))
x = x + drop(MHSA(LN(x)))
x = x + drop(Conv(LN(x)))
x = x + 1/2 drop(FFN2(LN(x)))
x = LN(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .blocks import Blocks, Lengths, position_frames
from .config import ConformerConfig
from .ops.activations import ACTIVATIONS
from .ops.checks import frame_mask
from .ops.glu_depthwise_conv import depthwise_conv1d, normalise
from .packing import Packing
from .plain import LAYER_NORM, LINEAR, NORMS, obstacle, readable
from .positions import apply_rotary, relative_sinusoids, rotary_tables
from .quantization import linear_class

__all__ = ["ConformerLayer", "ConvModule", "FeedForward", "Positions", "RelativeAttention"]

# classes of the submodules that are read where they can be (plain.py)
_FEED_FORWARD = (LAYER_NORM, LINEAR, LINEAR)
_PROJECTION = (LINEAR,)
_NORM_AHEAD = (LAYER_NORM,)
_DEPTHWISE = (frozenset({nn.Conv1d}),)
_CONV_NORM = (frozenset(NORMS),)
_CONVOLUTION = _DEPTHWISE + _CONV_NORM

# what a layer is given as positions: projected embeddings [2T-1, H, D], or rotary (cos, sin), or nothing
Positions = Tensor | tuple[Tensor, Tensor] | None


def _dtype_of(linear: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype of a linear map's input: that of its weight, or of ``x`` where it keeps the weight in another form."""
    weight = linear.weight
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype


class FeedForward(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: pre-norm, half-step feed-forward with its residual."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        linear = linear_class(config.weights)
        self.up = linear(config.d_model, config.ffn_dim)
        self.down = linear(config.ffn_dim, config.d_model)
        self.activation = config.activation
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        norm, up, down = self.norm, self.up, self.down
        dropout_p = self.dropout if self.training else 0.0
        if not readable(_FEED_FORWARD, norm, up, down):
            h = F.dropout(ACTIVATIONS[self.activation](up(norm(x))), dropout_p)  # [B, T, F]
            return x + 0.5 * F.dropout(down(h), dropout_p).to(x.dtype)
        return ops.feed_forward(
            x,
            norm.weight,
            norm.bias,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            scale=0.5,
            activation=self.activation,
            dropout_p=dropout_p,
            eps=norm.eps,
        )


class RelativeAttention(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: multi-head self-attention of normalised input, with the config's positions."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d, self.heads = config.d_model, config.num_heads
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        linear = linear_class(config.weights)
        self.qkv = linear(d, 3 * d, bias=config.attention_bias)
        self.out = linear(d, d, bias=config.attention_bias)
        self.position = config.position
        self.rotary_input = config.rotary_input
        self.dropout = config.dropout
        if config.position == "relative":
            self.pos = nn.Linear(d, d, bias=False)
            self.u = nn.Parameter(torch.zeros(self.heads, d // self.heads))
            self.v_bias = nn.Parameter(torch.zeros(self.heads, d // self.heads))

    def positions(self, x: Tensor) -> Positions:
        """Return the positions that :meth:`forward` needs for ``x [B, T, d_model]``; the same for all loops of this layer."""
        frames, d = x.shape[1], x.shape[2]
        if self.position == "relative":
            table = relative_sinusoids(frames, d, device=x.device, dtype=_dtype_of(self.pos, x))
            return self.pos(table).unflatten(-1, (self.heads, d // self.heads))
        if self.position == "rotary":
            return rotary_tables(frames, d // self.heads, device=x.device, dtype=_dtype_of(self.qkv, x))
        return None

    def forward(self, h: Tensor, lengths: Lengths, positions: Positions = None) -> Tensor:
        if positions is None:
            positions = self.positions(position_frames(h, lengths))
        d = h.shape[-1]
        split = (self.heads, d // self.heads)
        rotary = positions if isinstance(positions, tuple) else None
        if rotary is not None and isinstance(lengths, Packing):
            rotary = rotary[0][lengths.frame], rotary[1][lengths.frame]  # [total, D]
        if rotary is not None and self.rotary_input == "hidden":
            # queries and keys see rotated hidden states, values plain ones
            rotated = apply_rotary(h.unflatten(-1, split), *rotary).flatten(-2)
            if readable(_PROJECTION, self.qkv):
                weight, bias = self.qkv.weight, self.qkv.bias
                qk = F.linear(rotated, weight[: 2 * d], None if bias is None else bias[: 2 * d])
                v = F.linear(h, weight[2 * d :], None if bias is None else bias[2 * d :])
                q, k = qk.chunk(2, -1)
            else:
                # in one call, so that hooks run once; a third of its products is not used
                of_rotated, of_plain = self.qkv(torch.cat((rotated, h))).chunk(2)  # each [B, T, 3 d_model]
                (q, k, _), v = of_rotated.chunk(3, -1), of_plain[..., 2 * d :]
        else:
            q, k, v = self.qkv(h).chunk(3, -1)  # each [B, T, d_model]
        q, k, v = (t.unflatten(-1, split) for t in (q, k, v))  # [B, T, H, D]
        if rotary is not None and self.rotary_input == "query_key" and not isinstance(lengths, Blocks):
            cos, sin = (t.to(q.dtype) for t in rotary)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        o = self._attend(q, k, v, lengths, positions, self.dropout if self.training else 0.0)
        return self.out(o.flatten(-2))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, positions: Positions, dropout_p: float
    ) -> Tensor:
        """``[B, T, H, D] -> [B, T, H, D]``; of a packed batch ``[1, total, H, D]``."""
        relative = None
        if isinstance(positions, Tensor):
            relative = (positions.to(q.dtype), self.u.to(q.dtype), self.v_bias.to(q.dtype))
        if isinstance(lengths, Blocks):
            rotary = positions if isinstance(positions, tuple) else None
            return lengths.attend(q, k, v, relative=relative, rotary=rotary, dropout_p=dropout_p)
        if relative is not None:
            if isinstance(lengths, Packing):
                ends = lengths.cu_seqlens
                return ops.relpos_attention(q[0], k[0], v[0], *relative, cu_seqlens=ends, dropout_p=dropout_p)[None]
            return ops.relpos_attention(q, k, v, *relative, lengths=lengths, dropout_p=dropout_p)
        if isinstance(lengths, Packing):
            # PyTorch's attention takes padded batches
            layout = lengths.padded()
            q, k, v = (layout.spread(x[0]) for x in (q, k, v))
            o = ops.relpos_attention(q, k, v, lengths=layout.lengths, dropout_p=dropout_p)
            return layout.collect(o)[None]
        return ops.relpos_attention(q, k, v, lengths=lengths, dropout_p=dropout_p)


class ConvModule(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]``: pointwise, GLU, depthwise, norm, activation, pointwise, of normalised input."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d, k = config.d_model, config.conv_kernel_size
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        linear = linear_class(config.weights)
        self.pointwise1 = linear(d, 2 * d, bias=config.conv_bias)
        # the op does the work of the modules below, unless they were changed (plain.py)
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
        self.pointwise2 = linear(d, d, bias=config.conv_bias)
        self.config = config

    def forward(self, h: Tensor, lengths: Lengths) -> Tensor:
        y = self.pointwise1(h)  # [B, T, 2 d_model]
        if isinstance(lengths, Packing):
            layout = lengths.apart(self.config.conv_kernel_size // 2) if self._is_framewise() else lengths.padded()
            y = layout.collect(self.middle(layout.spread(y[0]), layout.lengths))[None]
        elif isinstance(lengths, Blocks):
            y = self.middle(*lengths.extend(y))[:, lengths.chunking.reach :]
        else:
            y = self.middle(y, lengths if self.config.padding == "masked" else None)
        return self.pointwise2(y)

    def middle(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute what is between the pointwise maps, ``[B, T, 2 d_model] -> [B, T, d_model]``; frames beyond the lengths
        count as zeros.
        """
        depthwise = self.depthwise
        if not readable(_CONVOLUTION, depthwise, self.depthwise_norm):
            return self._called(y, lengths)
        self._count_batch()
        bias = depthwise.bias
        return ops.glu_depthwise_conv(
            y,
            depthwise.weight[:, 0].to(y.dtype),
            None if bias is None else bias.to(y.dtype),
            lengths=lengths,
            activation=self.config.activation,
            **self._norm_options(),
        )

    def _is_framewise(self) -> bool:
        """Whether the norm is known to look at one frame at a time."""
        norm = self.depthwise_norm
        if not readable(_CONV_NORM, norm):
            return False
        return isinstance(norm, (nn.LayerNorm, nn.Identity)) or (isinstance(norm, nn.BatchNorm1d) and not norm.training)

    def _norm_options(self) -> dict[str, Any]:
        """Return the norm's arguments for the op, in its present state."""
        norm: Any = self.depthwise_norm
        options: dict[str, Any] = {"norm": NORMS[type(norm)]}
        if type(norm) is nn.Identity:
            return options
        options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        if type(norm) is nn.GroupNorm:
            options["num_groups"] = norm.num_groups
        elif type(norm) is nn.BatchNorm1d:
            options |= {"running_mean": norm.running_mean, "running_var": norm.running_var, "training": norm.training}
            if norm.training:
                options["momentum"] = norm.momentum
        return options

    def _count_batch(self) -> None:
        norm: Any = self.depthwise_norm
        if type(norm) is nn.BatchNorm1d and norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)

    def _called(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """Compute the op by calling its modules: ``[B, T, 2 d_model] -> [B, T, d_model]``."""
        real = None if lengths is None else frame_mask(lengths, y.shape[1])[..., None]  # [B, T, 1]
        y = F.glu(y, -1)
        if real is not None:
            y = y.masked_fill(~real, 0.0)
        y = self._call_depthwise(y.transpose(1, 2)).transpose(1, 2)
        if readable(_CONV_NORM, self.depthwise_norm):
            self._count_batch()
            y = normalise(y, real, **self._norm_options())
        else:
            y = self._call_norm(y, real)
        return ACTIVATIONS[self.config.activation](y)

    def _call_depthwise(self, y: Tensor) -> Tensor:
        """``[B, d_model, T] -> [B, d_model, T]``; the module is called unless its parameters may be read."""
        depthwise = self.depthwise
        if readable(_DEPTHWISE, depthwise):
            bias = depthwise.bias
            return depthwise_conv1d(y, depthwise.weight[:, 0].to(y.dtype), None if bias is None else bias.to(y.dtype))
        device = y.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        if device == "cpu" and dtype == torch.float16:
            raise NotImplementedError(
                f"ConvModule: {obstacle(depthwise, 'depthwise') or 'there are global module hooks'}, so that the convolution "
                "must be called, and PyTorch's float16 convolution may never return on a CPU; use float32 or bfloat16"
            )
        return depthwise(y)

    def _call_norm(self, y: Tensor, real: Tensor | None) -> Tensor:
        """Call the norm on ``[B, T, d_model]``; one that replaces a BatchNorm or GroupNorm is called with ``[B, d_model, T]``.

        A BatchNorm that takes statistics of the batch is called with the real frames alone, ``[M, d_model]``.
        """
        norm = self.depthwise_norm
        if self.config.conv_norm in ("layer", "none"):
            return norm(y)
        inner = list(norm.modules())
        if real is not None and any(isinstance(m, nn.GroupNorm) for m in inner):
            raise NotImplementedError(
                f"ConvModule: {obstacle(norm, 'depthwise_norm') or 'there are global module hooks'}, so that the norm must "
                "be called, and a GroupNorm would take statistics over the padding; leave it as it was, pass no lengths, or "
                "use padding='peer'"
            )
        batches = [m for m in inner if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if real is None or not any(m.training or m.running_mean is None for m in batches):
            return norm(y.transpose(1, 2)).transpose(1, 2)
        rows = norm(y[real[..., 0]])
        return rows.new_zeros(y.shape).index_put((real[..., 0],), rows)


class ConformerLayer(nn.Module):
    """One Conformer layer.

    ``forward(x [B, T, d_model], lengths [B] or None, positions=None) -> [B, T, d_model]``.  ``positions`` are those of
    :meth:`positions`; a loop computes them once, and a single call may leave them out.  A packed batch is
    ``x [1, total, d_model]`` with a :class:`~lcconformer.packing.Packing` in the place of the lengths, blocks of an utterance
    are ``x [B, Q, d_model]`` with :class:`~lcconformer.blocks.Blocks`.

    Args:
        config: supplies width, heads, kernel, norms, positions, dropout and padding.
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
        """Return the positions for inputs like ``x [B, T, d_model]``, to be passed to every call of :meth:`forward`."""
        return self.attention.positions(x)

    def forward(self, x: Tensor, lengths: Lengths = None, positions: Positions = None) -> Tensor:
        x = self.ffn1(x)
        first, second = self.attention, self.conv
        h = first.norm(x) if not self.convolution_first else second.norm(x)
        dropout_p = self.dropout if self.training else 0.0
        if self.convolution_first:
            y, following = second(h, lengths), first.norm
        else:
            y, following = first(h, lengths, positions), second.norm
        y = y.to(x.dtype)
        if readable(_NORM_AHEAD, following):
            x, h = ops.residual_layer_norm(
                x, y, following.weight, following.bias, dropout_p=dropout_p, eps=following.eps
            )
        else:
            x = x + F.dropout(y, dropout_p)
            h = following(x)
        y = first(h, lengths, positions) if self.convolution_first else second(h, lengths)
        x = x + F.dropout(y, dropout_p, self.training).to(x.dtype)
        return self.norm(self.ffn2(x))
