"""Functional ops, each with a pure-PyTorch reference in its file: ``from lcconformer import ops``."""

from .feed_forward import feed_forward
from .glu_depthwise_conv import glu_depthwise_conv
from .relpos_attention import relpos_attention
from .residual_layer_norm import residual_layer_norm

__all__ = ["feed_forward", "glu_depthwise_conv", "relpos_attention", "residual_layer_norm"]
