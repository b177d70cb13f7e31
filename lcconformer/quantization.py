"""Encoders whose matrices are stored in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LARGEST", "QuantizedLinear", "count_weights", "linear_class", "quantized"]

LARGEST = 127
"""The largest magnitude of a weight in 8 bits; -128 is not used, so that a weight and its negative are equally exact."""


class QuantizedLinear(nn.Module):
    """``x [..., in_features] -> x (scale * weight)^T + bias [..., out_features]``, in the dtype of ``x``.

    The weights are int8 with one scale for each output, symmetric around zero: half of the memory of bfloat16.  They have no
    gradient; gradients reach ``x`` and the bias.

    Attributes:
        weight: int8 ``[out_features, in_features]``.
        scale: ``[out_features]``, float32 whatever dtype the module is moved to.
        bias: ``[out_features]`` or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scale[:, None]).to(x.dtype), self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # what fn does besides is to move it
            self.scale = scale.to(self.scale.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Round a matrix ``[out_features, in_features]`` to 8 bits: the buffers of a :class:`QuantizedLinear`.

    Raises:
        ValueError: it has values that are not finite; the message has ``name``.
    """
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError(f"quantize: {name} has values that are not finite; repair the encoder first")
    scale = weight.abs().amax(1) / LARGEST  # [out_features]
    # a row of zeros stays one, whatever its scale
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    rounded = (weight / scale[:, None]).round().clamp(-LARGEST, LARGEST)
    return {"weight": rounded.to(torch.int8), "scale": scale}


def count_weights(module: nn.Module) -> int:
    """Count the parameters of a module, weights in 8 bits among them."""
    in_int8 = (m.weight.numel() for m in module.modules() if isinstance(m, QuantizedLinear))
    return sum(p.numel() for p in module.parameters()) + sum(in_int8)


def linear_class(weights: str) -> type[nn.Linear]:
    """Return the class of a layer's linear maps, by ``ConformerConfig.weights``."""
    return nn.Linear if weights == "float" else cast(type[nn.Linear], QuantizedLinear)
