"""Activations of the feed-forward and the convolution module, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "check_activation"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def check_activation(op: str, activation: str) -> None:
    """``activation`` is one of the names."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
