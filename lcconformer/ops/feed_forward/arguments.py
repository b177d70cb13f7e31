"""Arguments of feed_forward, and what a backend does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Contract

__all__ = ["Backend", "FeedForward", "Traits"]


@dataclass(frozen=True)
class FeedForward(Contract):
    """One call, checked.

    Attributes:
        x: ``[B, T, D]``.
        norm_weight, norm_bias: ``[D]``.
        w1, b1: ``[F, D]``, ``[F]`` or None.
        w2, b2: ``[D, F]``, ``[D]`` or None; under autocast the dtype of w1, b1, w2, b2 is not that of x.
        seed: int64 ``[1]`` of both dropouts; None: the kernels drop nothing.
        scale: factor of the branch.
        activation: name in ``ACTIVATIONS``.
        dropout_p: probability of dropping a hidden or an output element.
        eps: epsilon of the LayerNorm.
    """

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    seed: Tensor | None
    scale: float
    activation: str
    dropout_p: float
    eps: float


class Traits(NamedTuple):
    """What decides the backend: device, dtype and width D of x, dtypes of the norm and of w1, the activation."""

    device: torch.device
    dtype: torch.dtype
    width: int
    norm_dtype: torch.dtype
    weight_dtype: torch.dtype
    activation: str


class Backend(Protocol):
    """The kernels of one backend.  M rows are the frames of all utterances."""

    def unsupported(self, traits: Traits, /) -> list[str]:
        """Return why calls with these traits cannot be served; empty: they can."""

    def forward(self, args: FeedForward, save: bool, /) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (out like x, mean, rstd float32 ``[M]``, u = LN(x) W1' ``[M, F]``); the last three empty unless ``save``."""

    def backward(
        self, dout: Tensor, args: FeedForward, mean: Tensor, rstd: Tensor, u: Tensor, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (dx, (dnorm_weight, dnorm_bias) ``[2, D]``, dw1, db1, dw2, db2)."""

    def up(
        self, h: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str, /
    ) -> tuple[Tensor, Tensor]:
        """Return (u = h W1', g = drop(act(u + b1))), both ``[M, F]``, of rows h ``[M, D]``."""

    def up_backward(
        self,
        dz: Tensor,
        w2: Tensor,
        u: Tensor,
        b1: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        activation: str,
        /,
        *,
        du: Tensor | None = None,
        g: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (du, g recomputed, both ``[M, F]``, partial sums ``[P, F]`` of db1) from the gradient dz ``[M, D]`` of
        z = g W2'.

        Args:
            du, g: where they go, contiguous; None: new tensors.
        """
