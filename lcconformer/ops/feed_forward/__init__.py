"""Half-step feed-forward with its pre-norm and residual (Gulati et al. 2020, section 2.3; Macaron-Net).

out = x + scale * drop(W2 drop(act(W1 LN(x) + b1)) + b2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import check_activation
from ..checks import check_device, check_dropout, check_same, check_shape, floats
from ..derivatives import refuse_transforms
from ..dropout import dropout_seed
from . import reference
from .arguments import FeedForward, Traits
from .library import OP, FeedForwardFn, launch_forward
from .reference import feed_forward_reference

__all__ = ["OP", "FeedForward", "Traits", "feed_forward", "feed_forward_reference"]


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
        NotImplementedError: a forced backend cannot serve them.
    """
    check_shape(OP.name, "x", x, (None, None, None), "[B, T, D]")
    d = x.shape[-1]
    check_shape(OP.name, "w1", w1, (None, d), "[F, D]")
    f = w1.shape[0]
    check_shape(OP.name, "w2", w2, (d, f), "[D, F]")
    check_shape(OP.name, "norm_weight", norm_weight, (d,), "[D]")
    check_shape(OP.name, "norm_bias", norm_bias, (d,), "[D]")
    if b1 is not None:
        check_shape(OP.name, "b1", b1, (f,), "[F]")
    if b2 is not None:
        check_shape(OP.name, "b2", b2, (d,), "[D]")
    check_activation(OP.name, activation)
    check_dropout(OP.name, dropout_p)
    if torch.is_autocast_enabled(x.device.type):
        # as F.linear would; the residual stream keeps its dtype
        dtype = torch.get_autocast_dtype(x.device.type)
        w1, w2 = w1.to(dtype), w2.to(dtype)
        b1, b2 = None if b1 is None else b1.to(dtype), None if b2 is None else b2.to(dtype)
        check_same(OP.name, w1=w1, w2=w2, b1=b1, b2=b2)
    else:
        check_same(OP.name, x=x, w1=w1, w2=w2, b1=b1, b2=b2)
    check_device(OP.name, x, w1=w1, norm_weight=norm_weight, norm_bias=norm_bias)

    backend = OP.choose(Traits(x.device, x.dtype, d, norm_weight.dtype, w1.dtype, activation))
    scale, eps = floats(scale, eps)
    given = (x, norm_weight, norm_bias, w1, b1, w2, b2)
    if backend == "torch":
        return reference.apply(FeedForward(*given, None, scale, activation, dropout_p, eps))
    args = FeedForward(*given, dropout_seed(x, dropout_p), scale, activation, dropout_p, eps).flat()
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in given):
        refuse_transforms(OP.name)
        return FeedForwardFn.apply(*args, backend)
    return launch_forward(*args, False, backend=backend)[0]
