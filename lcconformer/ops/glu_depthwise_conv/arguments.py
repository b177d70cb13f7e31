"""Arguments of glu_depthwise_conv, and what a backend does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Contract

__all__ = ["NORMS", "Backend", "GluDepthwiseConv", "Statistics", "Traits"]

NORMS = ("none", "layer", "batch", "group")


@dataclass(frozen=True)
class GluDepthwiseConv(Contract):
    """One call, checked.

    Attributes:
        x: ``[B, T, 2C]`` values and gates.
        weight: ``[C, K]``.
        bias: ``[C]`` or None.
        lengths: ``[B]`` real frames, or None.
        norm_weight, norm_bias: ``[C]``; None without a norm.
        running_mean, running_var: ``[C]`` with ``norm="batch"``, else None; kernels only read them.
        norm: name in ``NORMS``.
        num_groups: of ``norm="group"``.
        training: whether BatchNorm takes the statistics of this batch; False for other norms.
        eps: epsilon of the norm.
        activation: name in ``ACTIVATIONS``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lengths: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    norm: str
    num_groups: int
    training: bool
    eps: float
    activation: str


class Traits(NamedTuple):
    """What decides the backend: device and dtype of x, channels C, norm and its dtype, the activation, and whether there
    will be a backward pass.
    """

    device: torch.device
    dtype: torch.dtype
    channels: int
    norm: str
    norm_dtype: torch.dtype | None
    training: bool
    activation: str
    gradients: bool = False


class Statistics(NamedTuple):
    """What a forward hands to its backward.

    Attributes:
        y: ``[B, T, C]`` the convolution before the norm; empty if not saved.
        mean, var: float32 ``[C]`` (batch) or ``[B, G]`` (group), else empty.
        frames: float32 ``[1]`` real frames of a training batch, else empty.
    """

    y: Tensor
    mean: Tensor
    var: Tensor
    frames: Tensor


class Backend(Protocol):
    """The kernels of one backend."""

    def unsupported(self, traits: Traits, /) -> list[str]:
        """Return why calls with these traits cannot be served; empty: they can."""

    def forward(self, args: GluDepthwiseConv, save: bool, /, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
        """Return the output ``[B, T, C]``, in ``out`` if it is given, and the statistics; what only a backward needs is
        filled if ``save``.
        """

    def backward(
        self,
        dout: Tensor,
        args: GluDepthwiseConv,
        saved: Statistics,
        /,
        *,
        dx: Tensor | None = None,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (dx ``[B, T, 2C]``, dweight ``[K, C]`` (transposed), dbias ``[C]``, (dnorm_bias, dnorm_weight)
        ``[2, C]`` or empty).  Bias and running statistics are not read, and may be None in ``args``.

        Args:
            dx: where it goes, contiguous; None: a new tensor.
            partial: return the gradients of parameters as partial sums, ``[P, ...]``, whose sum over the first dimension
                they are.
        """
