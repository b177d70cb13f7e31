"""The middle of the Conformer's convolution module: GLU, padding zeroed, depthwise convolution, norm, activation.

Gulati et al. 2020, figure 2.  Channels last throughout: ``[B, T, 2C] -> [B, T, C]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import check_activation
from ..checks import check_device, check_lengths, check_same, check_shape, floats
from ..derivatives import no_frames, refuse_transforms
from . import reference
from .arguments import NORMS, GluDepthwiseConv, Statistics, Traits
from .library import OP, GluDepthwiseConvFn, launch_forward
from .reference import depthwise_conv1d, glu_depthwise_conv_reference, normalise, update_running

__all__ = [
    "OP",
    "GluDepthwiseConv",
    "Statistics",
    "Traits",
    "depthwise_conv1d",
    "glu_depthwise_conv",
    "glu_depthwise_conv_reference",
    "normalise",
    "update_running",
]


def glu_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """``activation(norm(depthwise(mask(glu(x)))))`` over ``[B, T, 2C]``.

    Args:
        x: ``[B, T, 2C]``; the first C channels are values, the others gates.
        weight: ``[C, K]`` depthwise kernel, K odd and at most 63 ("same" padding, correlation as in ``F.conv1d``).
        bias: ``[C]`` added after the convolution.
        lengths: ``[B]`` int64 real frames; later frames are zeroed after the GLU, and batch and group
            statistics skip them.  ``None``: every frame counts, padding included.
        norm: ``"none"``, ``"layer"`` (over channels), ``"batch"`` or ``"group"`` (``num_groups``, per utterance).
        norm_weight, norm_bias: ``[C]`` affine parameters, needed unless ``norm="none"``.
        running_mean, running_var: ``[C]`` for ``norm="batch"``; read in evaluation, updated in place in training.
        training: use the statistics of this batch (``norm="batch"`` only).
        activation: ``"silu"``, ``"gelu"`` or ``"relu"``.

    Returns:
        ``[B, T, C]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: a forced backend cannot serve them.
    """
    check_shape(OP.name, "weight", weight, (None, None), "[C, K]")
    c, k = weight.shape
    if k % 2 == 0 or not 1 <= k <= 63:
        raise ValueError(f"{OP.name}: weight has K = {k}; expected an odd kernel size from 1 to 63")
    check_shape(OP.name, "x", x, (None, None, 2 * c), "[B, T, 2C]")
    if norm not in NORMS:
        raise ValueError(f"{OP.name}: norm is {norm!r}; expected one of {', '.join(NORMS)}")
    check_activation(OP.name, activation)
    if bias is not None:
        check_shape(OP.name, "bias", bias, (c,), "[C]")
    check_same(OP.name, x=x, weight=weight, bias=bias)
    if norm != "none":
        for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if p is None:
                raise ValueError(f"{OP.name}: norm={norm!r} needs {name} [C]; got None")
            check_shape(OP.name, name, p, (c,), "[C]")
    if norm == "batch":
        for name, p in (("running_mean", running_mean), ("running_var", running_var)):
            if p is None:
                raise ValueError(f"{OP.name}: norm='batch' needs {name} [C]; got None")
            check_shape(OP.name, name, p, (c,), "[C]")
    if norm == "group" and (num_groups < 1 or c % num_groups):
        raise ValueError(f"{OP.name}: num_groups is {num_groups}; expected a divisor of C = {c}")
    check_device(
        OP.name, x, norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running_mean, running_var=running_var
    )
    check_lengths(OP.name, lengths, x.shape[0], x.shape[1], x.device)

    if x.numel() == 0:
        return no_frames(x[..., :c], weight, bias, *(() if norm == "none" else (norm_weight, norm_bias)))
    training = training and norm == "batch"
    norm_dtype = None if norm == "none" or norm_weight is None else norm_weight.dtype
    affine = (None, None) if norm == "none" else (norm_weight, norm_bias)
    gradients = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias, *affine))
    backend = OP.choose(Traits(x.device, x.dtype, c, norm, norm_dtype, training, activation, gradients))
    (eps,) = floats(eps)
    running = (running_mean, running_var) if norm == "batch" else (None, None)
    args = GluDepthwiseConv(x, weight, bias, lengths, *affine, *running, norm, num_groups, training, eps, activation)
    if backend == "torch":
        return reference.apply(args, momentum)
    if gradients:
        refuse_transforms(OP.name)
        out, mean, var, frames = GluDepthwiseConvFn.apply(*args.flat(), backend)
    else:
        out, _y, mean, var, frames = launch_forward(*args.flat(), False, backend=backend)
    if args.training and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, var, frames, momentum)
    return out
