"""A residual addition and the LayerNorm that follows it.

s = x + alpha * drop(y),    n = LN(s)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._checks import check_same, check_shape

__all__ = ["residual_layer_norm", "residual_layer_norm_reference"]

OP = "residual_layer_norm"


def residual_layer_norm_reference(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
    s = x + alpha * F.dropout(y, dropout_p)
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps)


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
    """
    if x.dim() == 0:
        raise ValueError(f"{OP}: x has no dimensions; expected [..., D]")
    check_shape(OP, "y", y, tuple(x.shape), "[..., D]")
    check_shape(OP, "weight", weight, (x.shape[-1],), "[D]")
    check_shape(OP, "bias", bias, (x.shape[-1],), "[D]")
    check_same(OP, x=x, y=y)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    return residual_layer_norm_reference(x, y, weight, bias, alpha=alpha, dropout_p=dropout_p, eps=eps)
