"""Arguments of residual_layer_norm, and what a backend does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Contract

__all__ = ["MAX_WIDTH", "Backend", "ResidualLayerNorm", "Traits"]

# a Triton program owns whole rows
MAX_WIDTH = 8192


@dataclass(frozen=True)
class ResidualLayerNorm(Contract):
    """One call, checked.

    Attributes:
        x, y: ``[..., D]`` residual stream and branch; y may have another dtype, under autocast.
        weight, bias: ``[D]``.
        seed: int64 ``[1]`` of the dropout of y; None: the kernels drop nothing.
        alpha: factor of the branch.
        dropout_p: probability of dropping an element of y.
        eps: epsilon of the LayerNorm.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor
    seed: Tensor | None
    alpha: float
    dropout_p: float
    eps: float


class Traits(NamedTuple):
    """What decides the backend: device and dtype of x, its width D, and the dtype of the norm's weight."""

    device: torch.device
    dtype: torch.dtype
    width: int
    weight_dtype: torch.dtype


class Backend(Protocol):
    """The kernels of one backend.  M rows are the frames of all utterances."""

    def unsupported(self, traits: Traits, /) -> list[str]:
        """Return why calls with these traits cannot be served; empty: they can."""

    def forward(
        self, args: ResidualLayerNorm, /, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (s, LN(s)), both shaped like x, and mean, rstd: float32 ``[M]``; s in the dtype of x, LN(s) in ``dtype``
        or that of x.
        """

    def backward(
        self,
        ds: Tensor,
        dn: Tensor,
        s: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        seed: Tensor | None,
        alpha: float,
        dropout_p: float,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dx, dy, (dweight, dbias) ``[2, D]``); dy is empty where it equals dx: alpha = 1 and no dropout."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (LN(x) ``[M, D]`` in ``dtype``, mean, rstd ``[M]``) of rows ``x [M, D]`` with unit stride in D."""

    def layer_norm_backward(
        self,
        dn: Tensor,
        ds: Tensor,
        s: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        /,
        *,
        n: Tensor | None = None,
        dy: Tensor | None = None,
        alpha: float = 1.0,
        seed: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return (dx like s, partial sums ``[P, 2, D]`` of (dweight, dbias)) of rows with unit stride in D.

        Args:
            dn: gradient of LN(s), in any dtype.
            ds: gradient of s, in the dtype of s.
            n, dy: where LN(s) and the gradient of the branch go, contiguous ``[M, D]`` in any dtype; None: not wanted.

        The gradient of the parameters is the sum over the first dimension of the partial sums.
        """
