"""A residual addition and the LayerNorm that follows it.

s = x + alpha * drop(y),    n = LN(s)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_device, check_dropout, check_same, check_shape, check_tensor, floats
from ..derivatives import refuse_transforms
from ..dropout import dropout_seed
from . import reference
from .arguments import ResidualLayerNorm, Traits
from .library import OP, ResidualLayerNormFn, launch_forward
from .reference import residual_layer_norm_reference

__all__ = ["OP", "ResidualLayerNorm", "Traits", "residual_layer_norm", "residual_layer_norm_reference"]


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``(x + alpha * drop(y), LayerNorm of it)``.

    Args:
        x, y: ``[..., D]`` residual stream and branch.
        weight, bias: ``[D]`` of the LayerNorm.
        alpha: factor of the branch.
        dropout_p: probability of dropping an element of ``y``.

    Returns:
        two tensors shaped like ``x``, in its dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
        NotImplementedError: a forced backend cannot serve them.
    """
    check_tensor(OP.name, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{OP.name}: x has no dimensions; expected [..., D]")
    check_shape(OP.name, "y", y, tuple(x.shape), "[..., D]")
    check_shape(OP.name, "weight", weight, (x.shape[-1],), "[D]")
    check_shape(OP.name, "bias", bias, (x.shape[-1],), "[D]")
    check_same(OP.name, x=x, y=y)
    check_dropout(OP.name, dropout_p)
    check_device(OP.name, x, weight=weight, bias=bias)

    backend = OP.choose(Traits(x.device, x.dtype, x.shape[-1], weight.dtype))
    alpha, eps = floats(alpha, eps)
    if backend == "torch":
        return reference.apply(ResidualLayerNorm(x, y, weight, bias, None, alpha, dropout_p, eps))
    args = ResidualLayerNorm(x, y, weight, bias, dropout_seed(x, dropout_p), alpha, dropout_p, eps).flat()
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, y, weight, bias)):
        refuse_transforms(OP.name)
        return ResidualLayerNormFn.apply(*args, backend)
    s, n, _mean, _rstd = launch_forward(*args, backend=backend)
    return s, n
