"""The backend of each op that the training of a layer runs on, chosen once for all loops of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcconformer.ops.feed_forward import arguments as feed_forward
from lcconformer.ops.feed_forward.library import OP as FEED_FORWARD
from lcconformer.ops.glu_depthwise_conv import arguments as glu_depthwise_conv
from lcconformer.ops.glu_depthwise_conv.library import OP as GLU_DEPTHWISE_CONV
from lcconformer.ops.registry import OPS, Choice, Op
from lcconformer.ops.relpos_attention import arguments as relpos_attention
from lcconformer.ops.relpos_attention.library import OP as RELPOS_ATTENTION
from lcconformer.ops.residual_layer_norm import arguments as residual_layer_norm
from lcconformer.ops.residual_layer_norm.library import OP as RESIDUAL_LAYER_NORM
from lcconformer.stack import LayerStack

from .gradients import Accumulate, add_partial_sums
from .watch import watch

__all__ = ["Kernels", "choose_kernels", "explain_ops", "products_dtype"]


@dataclass(frozen=True)
class Kernels:
    """The kernels of one call.

    Attributes:
        relpos_attention, glu_depthwise_conv, feed_forward, residual_layer_norm: backends, as the ops choose them.
        names: their names, in this order.
        dtype: of the matrix products; the residual stream has another one under autocast.
        accumulate: adds up the partial sums that the backends return.
    """

    relpos_attention: relpos_attention.Backend
    glu_depthwise_conv: glu_depthwise_conv.Backend
    feed_forward: feed_forward.Backend
    residual_layer_norm: residual_layer_norm.Backend
    names: tuple[str, ...]
    dtype: torch.dtype
    accumulate: Accumulate


def products_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products; the residual stream keeps that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _traits(stack: LayerStack, x: Tensor) -> dict[str, Any]:
    """Return the traits of each op of a layer for ``x [B, T, d_model]``, as the op would find them."""
    config = stack.config
    d, device, dtype, activation = x.shape[-1], x.device, products_dtype(x), config.activation
    # of encoders whose norms were all replaced, which call few ops, the dtype is a guess
    norm_dtype = next((m.weight.dtype for m in stack.layers.modules() if type(m) is nn.LayerNorm), x.dtype)
    training = watch(stack).trains_batch_norm()
    conv_norm_dtype = None if config.conv_norm == "none" else norm_dtype
    return {
        "relpos_attention": relpos_attention.Traits(device, dtype, d // config.num_heads),
        "glu_depthwise_conv": glu_depthwise_conv.Traits(
            device, dtype, d, config.conv_norm, conv_norm_dtype, training, activation, torch.is_grad_enabled()
        ),
        "feed_forward": feed_forward.Traits(device, x.dtype, d, norm_dtype, dtype, activation),
        "residual_layer_norm": residual_layer_norm.Traits(device, x.dtype, d, norm_dtype),
    }


def explain_ops(stack: LayerStack, x: Tensor) -> dict[str, Choice]:
    """Return the choice of each op of a layer, without raising; attention without relative positions is PyTorch's own."""
    traits = _traits(stack, x)
    if stack.config.position != "relative":
        del traits["relpos_attention"]
    return {name: OPS[name].explain(own) for name, own in traits.items()}


def _explained(op: Op[Any, Any], traits: Any) -> str:
    choice = op.explain(traits)
    if choice.backend is None:
        raise NotImplementedError(choice.error)
    return choice.backend


def choose_kernels(stack: LayerStack, x: Tensor, explaining: bool) -> Kernels:
    """Choose what serves the layers of ``stack`` for ``x [B, T, d_model]``, as their ops choose.

    Args:
        explaining: the ops neither log nor record the choice.

    Raises:
        NotImplementedError: a forced backend cannot serve.
    """
    traits = _traits(stack, x)
    # the engine has the products of the feed-forward in one dtype, residual stream and all
    traits["feed_forward"] = traits["feed_forward"]._replace(dtype=products_dtype(x))
    ask = _explained if explaining else Op.choose
    attention = ask(RELPOS_ATTENTION, traits["relpos_attention"])
    # this engine has a backward pass, whatever mode it is asked in
    convolution = ask(GLU_DEPTHWISE_CONV, traits["glu_depthwise_conv"]._replace(gradients=True))
    hidden = ask(FEED_FORWARD, traits["feed_forward"])
    norm = ask(RESIDUAL_LAYER_NORM, traits["residual_layer_norm"])
    accumulate: Accumulate = add_partial_sums
    if norm == "triton":
        from lcconformer.kernels import partials

        accumulate = partials.accumulate
    return Kernels(
        RELPOS_ATTENTION.backends[attention],
        GLU_DEPTHWISE_CONV.backends[convolution],
        FEED_FORWARD.backends[hidden],
        RESIDUAL_LAYER_NORM.backends[norm],
        names=(attention, convolution, hidden, norm),
        dtype=products_dtype(x),
        accumulate=accumulate,
    )
