"""Half-step feed-forward with its pre-norm and residual (Gulati et al. 2020, section 2.3; Macaron-Net).

out = x + scale * drop(W2 drop(act(W1 LN(x) + b1)) + b2)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._checks import check_same, check_shape
from .glu_depthwise_conv import ACTIVATIONS

__all__ = ["feed_forward", "feed_forward_reference"]

OP = "feed_forward"


def feed_forward_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    scale: float = 0.5,
    activation: str = "silu",
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    h = F.dropout(ACTIVATIONS[activation](F.linear(h, w1, b1)), dropout_p)  # [B, T, F]
    return x + scale * F.dropout(F.linear(h, w2, b2), dropout_p)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    scale: float = 0.5,
    activation: str = "silu",
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Residual feed-forward branch (module docstring).

    Args:
        x: ``[B, T, D]``.
        norm_weight, norm_bias: ``[D]`` of the LayerNorm before the branch.
        w1, b1: ``[F, D]``, ``[F]`` (or None); w2, b2: ``[D, F]``, ``[D]`` (or None).
        scale: factor of the branch, 1/2 in a Conformer.
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.
        dropout_p: dropout after the activation and after the second projection.

    Returns:
        ``[B, T, D]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    check_shape(OP, "x", x, (None, None, None), "[B, T, D]")
    d = x.shape[-1]
    check_shape(OP, "w1", w1, (None, d), "[F, D]")
    f = w1.shape[0]
    check_shape(OP, "w2", w2, (d, f), "[D, F]")
    check_shape(OP, "norm_weight", norm_weight, (d,), "[D]")
    check_shape(OP, "norm_bias", norm_bias, (d,), "[D]")
    if b1 is not None:
        check_shape(OP, "b1", b1, (f,), "[F]")
    if b2 is not None:
        check_shape(OP, "b2", b2, (d,), "[D]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    check_same(OP, x=x, w1=w1, w2=w2, b1=b1, b2=b2)
    return feed_forward_reference(
        x, norm_weight, norm_bias, w1, b1, w2, b2, scale=scale, activation=activation, dropout_p=dropout_p, eps=eps
    )
