"""A typical call of each op, as a layer makes it: what ``info`` asks about and ``doctor`` checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .feed_forward.arguments import Traits as FeedForwardTraits
from .glu_depthwise_conv.arguments import Traits as GluDepthwiseConvTraits
from .relpos_attention.arguments import Traits as RelposAttentionTraits
from .residual_layer_norm.arguments import Traits as ResidualLayerNormTraits

__all__ = ["CALLS", "TRAITS", "Sizes"]

# (name, *shape) -> the tensor
Tensors = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """A batch of a base model: utterances, frames, width, heads, hidden width, taps."""

    batch: int = 8
    frames: int = 400
    d_model: int = 256
    heads: int = 4
    ffn_dim: int = 1024
    kernel_size: int = 31


def _relpos_attention(op: Callable, tensor: Tensors, sizes: Sizes, lengths: Tensor) -> object:
    b, t, h, d = sizes.batch, sizes.frames, sizes.heads, sizes.d_model // sizes.heads
    q, k, v = (tensor(name, b, t, h, d) for name in "qkv")
    return op(
        q, k, v, tensor("pos", 2 * t - 1, h, d), tensor("u", h, d), tensor("v_bias", h, d), lengths=lengths
    )  # fmt: skip


def _glu_depthwise_conv(op: Callable, tensor: Tensors, sizes: Sizes, lengths: Tensor) -> object:
    c = sizes.d_model
    x, weight = tensor("x", sizes.batch, sizes.frames, 2 * c), tensor("weight", c, sizes.kernel_size)
    norm_weight, norm_bias = tensor("norm_weight", c), tensor("norm_bias", c)
    return op(
        x, weight, tensor("bias", c), lengths=lengths, norm="layer", norm_weight=norm_weight, norm_bias=norm_bias
    )  # fmt: skip


def _feed_forward(op: Callable, tensor: Tensors, sizes: Sizes, lengths: Tensor) -> object:
    d, f = sizes.d_model, sizes.ffn_dim
    x, norm = tensor("x", sizes.batch, sizes.frames, d), (tensor("norm_weight", d), tensor("norm_bias", d))
    return op(x, *norm, tensor("w1", f, d), tensor("b1", f), tensor("w2", d, f), tensor("b2", d))


def _residual_layer_norm(op: Callable, tensor: Tensors, sizes: Sizes, lengths: Tensor) -> object:
    x, y = (tensor(name, sizes.batch, sizes.frames, sizes.d_model) for name in "xy")
    return op(x, y, tensor("weight", sizes.d_model), tensor("bias", sizes.d_model))


# op -> (function with the signature of the op, tensors, sizes, lengths [B]) -> what the function returns
CALLS: dict[str, Callable[[Callable, Tensors, Sizes, Tensor], object]] = {
    "relpos_attention": _relpos_attention,
    "glu_depthwise_conv": _glu_depthwise_conv,
    "feed_forward": _feed_forward,
    "residual_layer_norm": _residual_layer_norm,
}

# op -> (device, dtype of everything, sizes) -> the traits of that call
TRAITS: dict[str, Callable[[torch.device, torch.dtype, Sizes], Any]] = {
    "relpos_attention": lambda device, dtype, s: RelposAttentionTraits(device, dtype, s.d_model // s.heads),
    "glu_depthwise_conv": lambda device, dtype, s: GluDepthwiseConvTraits(
        device, dtype, s.d_model, "layer", dtype, False, "silu"
    ),
    "feed_forward": lambda device, dtype, s: FeedForwardTraits(device, dtype, s.d_model, dtype, dtype, "silu"),
    "residual_layer_norm": lambda device, dtype, s: ResidualLayerNormTraits(device, dtype, s.d_model, dtype),
}
