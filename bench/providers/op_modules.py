"""Each op as a module with one input: in plain PyTorch, and by lcconformer, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcconformer import ops
from lcconformer.ops.glu_depthwise_conv.reference import depthwise_conv1d

from ..core.case import Case
from . import baselines

__all__ = ["BASELINE_OPS", "LIBRARY_OPS", "SDPA_OPS"]


class _Op(nn.Module):
    """Holds random parameters of the given shapes, the same for every provider; ``function(module, x)`` is the forward."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    pos: Tensor
    u: Tensor
    v_bias: Tensor

    def __init__(self, case: Case, function: Callable, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            if name in ("w1", "w2", "weight") and len(shape) > 1:
                value = noise / shape[-1] ** 0.5
            elif name == "norm_weight":
                value = 1.0 + 0.1 * noise
            else:
                value = 0.5 * noise
            self.register_parameter(name, nn.Parameter(value))
        self.function = function
        self.p = case.dropout

    @property
    def dropout_p(self) -> float:
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def _attention(function: Callable) -> Callable[[Case], _Op]:
    """Attention on ``x [B, T, 3, H, D]``, which holds q, k, v."""

    def call(m: _Op, x: Tensor) -> Tensor:
        q, k, v = x.unbind(2)
        return function(q, k, v, m.pos, m.u, m.v_bias, dropout_p=m.dropout_p)

    def build(case: Case) -> _Op:
        h, d = case.num_heads, case.d_model // case.num_heads
        return _Op(case, call, pos=(2 * case.frames - 1, h, d), u=(h, d), v_bias=(h, d))

    return build


def _convolution(call: Callable) -> Callable[[Case], _Op]:
    """Convolution on ``x [B, T, 2C]``, with LayerNorm as in the encoder of the suite."""

    def build(case: Case) -> _Op:
        c = case.d_model
        return _Op(case, call, weight=(c, case.kernel), bias=(c,), norm_weight=(c,), norm_bias=(c,))

    return build


def _plain_convolution(m: _Op, x: Tensor) -> Tensor:
    y = depthwise_conv1d(F.glu(x, -1).transpose(1, 2), m.weight, m.bias)
    return F.silu(F.layer_norm(y.transpose(1, 2), m.norm_weight.shape, m.norm_weight, m.norm_bias))


def _library_convolution(m: _Op, x: Tensor) -> Tensor:
    return ops.glu_depthwise_conv(
        x, m.weight, m.bias, norm="layer", norm_weight=m.norm_weight, norm_bias=m.norm_bias, training=m.training
    )


def _feed_forward(call: Callable) -> Callable[[Case], _Op]:
    """Feed-forward module on ``x [B, T, D]``."""

    def build(case: Case) -> _Op:
        d, f = case.d_model, case.ffn_dim
        return _Op(case, call, norm_weight=(d,), norm_bias=(d,), w1=(f, d), b1=(f,), w2=(d, f), b2=(d,))

    return build


def _plain_feed_forward(m: _Op, x: Tensor) -> Tensor:
    h = F.linear(F.layer_norm(x, x.shape[-1:], m.norm_weight, m.norm_bias), m.w1, m.b1)
    h = F.linear(F.dropout(F.silu(h), m.dropout_p), m.w2, m.b2)
    return x + 0.5 * F.dropout(h, m.dropout_p)


def _library_feed_forward(m: _Op, x: Tensor) -> Tensor:
    return ops.feed_forward(x, m.norm_weight, m.norm_bias, m.w1, m.b1, m.w2, m.b2, dropout_p=m.dropout_p)


def _residual(call: Callable) -> Callable[[Case], _Op]:
    """Residual and LayerNorm on ``x [B, 2, T, D]``, which holds the residual stream and the branch."""

    def build(case: Case) -> _Op:
        return _Op(case, call, norm_weight=(case.d_model,), norm_bias=(case.d_model,))

    return build


def _plain_residual(m: _Op, x: Tensor) -> tuple[Tensor, Tensor]:
    stream, branch = x.unbind(1)
    total = stream + F.dropout(branch, m.dropout_p)
    return total, F.layer_norm(total, total.shape[-1:], m.norm_weight, m.norm_bias)


def _library_residual(m: _Op, x: Tensor) -> tuple[Tensor, Tensor]:
    stream, branch = x.unbind(1)
    return ops.residual_layer_norm(stream, branch, m.norm_weight, m.norm_bias, dropout_p=m.dropout_p)


BASELINE_OPS: dict[str, Callable[[Case], nn.Module]] = {
    "relpos_attention": _attention(baselines.relative_attention),
    "glu_depthwise_conv": _convolution(_plain_convolution),
    "feed_forward": _feed_forward(_plain_feed_forward),
    "residual_layer_norm": _residual(_plain_residual),
}
SDPA_OPS = {"relpos_attention": _attention(baselines.sdpa_relative_attention)}
LIBRARY_OPS: dict[str, Callable[[Case], nn.Module]] = {
    "relpos_attention": _attention(ops.relpos_attention),
    "glu_depthwise_conv": _convolution(_library_convolution),
    "feed_forward": _feed_forward(_library_feed_forward),
    "residual_layer_norm": _residual(_library_residual),
}
