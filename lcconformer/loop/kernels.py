"""The backend of each op that the training of a layer runs on, chosen once for all loops of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcconformer.ops.feed_forward import arguments as feed_forward
from lcconformer.ops.feed_forward.library import OP as FEED_FORWARD
from lcconformer.ops.glu_depthwise_conv import arguments as glu_depthwise_conv
from lcconformer.ops.glu_depthwise_conv.library import OP as GLU_DEPTHWISE_CONV
from lcconformer.ops.relpos_attention import arguments as relpos_attention
from lcconformer.ops.relpos_attention.library import OP as RELPOS_ATTENTION
from lcconformer.ops.residual_layer_norm import arguments as residual_layer_norm
from lcconformer.ops.residual_layer_norm.library import OP as RESIDUAL_LAYER_NORM

if TYPE_CHECKING:
    from lcconformer.config import ConformerConfig

__all__ = ["Kernels", "choose_kernels"]


@dataclass(frozen=True)
class Kernels:
    """The kernels of one call.

    Attributes:
        relpos_attention, glu_depthwise_conv, feed_forward, residual_layer_norm: backends, as the ops choose them.
        names: their names, in this order.
        dtype: of the matrix products; the residual stream has another one under autocast.
    """

    relpos_attention: relpos_attention.Backend
    glu_depthwise_conv: glu_depthwise_conv.Backend
    feed_forward: feed_forward.Backend
    residual_layer_norm: residual_layer_norm.Backend
    names: tuple[str, ...]
    dtype: torch.dtype


def choose_kernels(
    config: ConformerConfig, x: Tensor, dtype: torch.dtype, norm_dtype: torch.dtype, training: bool
) -> Kernels:
    """Choose what serves a layer of inputs ``x [B, T, D]`` and matrix products in ``dtype``, as its ops choose.

    Args:
        norm_dtype: dtype of the weights of the layer's norms.
        training: whether BatchNorm uses the statistics of the batch.

    Raises:
        NotImplementedError: a forced backend cannot serve.
    """
    d, device, activation = x.shape[-1], x.device, config.activation
    training = training and config.conv_norm == "batch"
    conv_norm_dtype = None if config.conv_norm == "none" else norm_dtype
    attention = RELPOS_ATTENTION.choose(relpos_attention.Traits(device, dtype, d // config.num_heads))
    convolution = GLU_DEPTHWISE_CONV.choose(
        glu_depthwise_conv.Traits(device, dtype, d, config.conv_norm, conv_norm_dtype, training, activation)
    )
    hidden = FEED_FORWARD.choose(feed_forward.Traits(device, dtype, d, norm_dtype, dtype, activation))
    norm = RESIDUAL_LAYER_NORM.choose(residual_layer_norm.Traits(device, x.dtype, d, norm_dtype))
    return Kernels(
        RELPOS_ATTENTION.backends[attention],
        GLU_DEPTHWISE_CONV.backends[convolution],
        FEED_FORWARD.backends[hidden],
        RESIDUAL_LAYER_NORM.backends[norm],
        names=(attention, convolution, hidden, norm),
        dtype=dtype,
    )
