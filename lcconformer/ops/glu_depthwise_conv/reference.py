"""glu_depthwise_conv in plain PyTorch: the oracle of every kernel, and the fallback."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import ACTIVATIONS
from ..checks import frame_mask
from .arguments import GluDepthwiseConv, Statistics, Traits

__all__ = [
    "apply",
    "backward",
    "depthwise_conv1d",
    "forward",
    "glu_depthwise_conv_reference",
    "normalise",
    "unsupported",
    "update_running",
]


def depthwise_conv1d(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel of ``y [B, C, T]`` with its row of ``weight [C, K]``; "same" padding, ``[B, C, T]``.

    ``F.conv1d``, except in float16 on a CPU, under autocast included, where the result is that of float32, rounded: oneDNN
    never returns for some numbers of channels on processors with AVX512-FP16 or AMX (2 and 5 with K = 31, torch 2.13).
    """
    c, k = weight.shape
    taps = weight[:, None]  # [C, 1, K]
    if y.device.type == "cpu" and y.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else y.dtype
        if dtype == torch.float16:
            bias = None if bias is None else bias.float()
            with torch.autocast("cpu", enabled=False):
                return F.conv1d(y.float(), taps.float(), bias, padding=k // 2, groups=c).half()
    return F.conv1d(y, taps, bias, padding=k // 2, groups=c)


def _wide(y: Tensor) -> Tensor:
    """Statistics of half-precision values are taken in float32."""
    return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y


class Batch(NamedTuple):
    """Mean ``[C]``, biased variance ``[C]`` and number of the real frames of a batch."""

    mean: Tensor
    var: Tensor
    frames: Tensor


def _batch_statistics(y: Tensor, real: Tensor | None) -> Batch:
    """Take the statistics of ``y [B, T, C]`` where ``real [B, T, 1]``."""
    x = _wide(y)
    if real is None:
        count = torch.full((), x.shape[0] * x.shape[1], dtype=x.dtype, device=x.device)
        mean = x.mean((0, 1))
        centred = x - mean
    else:
        count = real.sum().to(x.dtype)
        mean = x.masked_fill(~real, 0.0).sum((0, 1)) / count.clamp(min=1)
        centred = (x - mean).masked_fill(~real, 0.0)
    return Batch(mean, centred.square().sum((0, 1)) / count.clamp(min=1), count)


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:
    """Move running statistics ``[C]`` in place as ``nn.BatchNorm1d`` does: unbiased variance.

    A batch without any real frame teaches nothing.
    """
    unbiased = var * (count / (count - 1).clamp(min=1))
    step = momentum * (count > 0).to(running_mean.dtype)
    running_mean.add_((mean.to(running_mean.dtype) - running_mean) * step)
    running_var.add_((unbiased.to(running_var.dtype) - running_var) * step)


def _group_norm(y, weight, bias, groups, real, eps):
    """Normalise ``[B, T, C]`` per utterance and group of channels, over the real frames."""
    b, t, c = y.shape
    x = _wide(y).reshape(b, t, groups, c // groups)
    if real is None:
        keep = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=y.device)
        count = torch.full((1, 1, 1, 1), t * (c // groups), dtype=x.dtype, device=y.device)
    else:
        keep = real[..., None]  # [B, T, 1, 1]
        count = keep.sum(1, keepdim=True).to(x.dtype).clamp(min=1) * (c // groups)
    mean = x.masked_fill(~keep, 0.0).sum((1, 3), keepdim=True) / count
    var = (x - mean).masked_fill(~keep, 0.0).square().sum((1, 3), keepdim=True) / count
    x = ((x - mean) * torch.rsqrt(var + eps)).reshape(b, t, c).to(y.dtype)
    return x * weight + bias


def _convolution(args: GluDepthwiseConv) -> tuple[Tensor, Tensor | None]:
    """Return the convolution's output ``[B, T, C]`` and the mask of real frames ``[B, T, 1]``, None without lengths."""
    y = F.glu(args.x, -1)
    real = None if args.lengths is None else frame_mask(args.lengths, y.shape[1])[..., None]
    if real is not None:
        y = y.masked_fill(~real, 0.0)
    if y.shape[1]:
        y = depthwise_conv1d(y.transpose(1, 2), args.weight, args.bias).transpose(1, 2)
    return y, real


def normalise(
    y: Tensor,
    real: Tensor | None,
    *,
    norm: str,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_groups: int = 1,
    training: bool = False,
    momentum: float | None = None,
    eps: float = 1e-5,
    batch: Batch | None = None,
) -> Tensor:
    """Apply the op's norm to ``y [B, T, C]``.

    Args:
        real: ``[B, T, 1]`` marks the frames that count in statistics; None: all.
        momentum: moves the running statistics of a training BatchNorm; None leaves them.
        batch: statistics of a training BatchNorm, where they are known already.
    """
    if norm == "layer":
        return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    if norm == "group":
        return _group_norm(y, norm_weight, norm_bias, num_groups, real, eps)
    if norm == "none":
        return y
    mean, var = running_mean, running_var
    if training:
        batch = _batch_statistics(y, real) if batch is None else batch
        if momentum is not None and running_mean is not None and running_var is not None:
            update_running(running_mean, running_var, batch.mean, batch.var, batch.frames, momentum)
        mean, var = batch.mean, batch.var
    if norm_weight is None or norm_bias is None or mean is None or var is None:
        raise ValueError("glu_depthwise_conv: norm='batch' needs norm_weight, norm_bias and statistics; got None")
    scale = norm_weight * torch.rsqrt(var + eps).to(norm_weight.dtype)
    return y * scale.to(y.dtype) + (norm_bias - mean.to(norm_bias.dtype) * scale).to(y.dtype)


def _finish(
    args: GluDepthwiseConv, y: Tensor, real: Tensor | None, momentum: float | None, batch: Batch | None
) -> Tensor:
    """Norm and activation of the convolution's output."""
    y = normalise(
        y,
        real,
        norm=args.norm,
        norm_weight=args.norm_weight,
        norm_bias=args.norm_bias,
        running_mean=args.running_mean,
        running_var=args.running_var,
        num_groups=args.num_groups,
        training=args.training,
        momentum=momentum,
        eps=args.eps,
        batch=batch,
    )
    return ACTIVATIONS[args.activation](y)


def apply(args: GluDepthwiseConv, momentum: float | None = None) -> Tensor:
    """Run the differentiable op; a training BatchNorm moves its running statistics if ``momentum`` is given."""
    y, real = _convolution(args)
    return _finish(args, y, real, momentum, None) if y.shape[1] else y


def glu_depthwise_conv_reference(
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
    """Run the differentiable reference with the signature of :func:`~lcconformer.ops.glu_depthwise_conv`."""
    statistics = (norm_weight, norm_bias, running_mean, running_var)
    training = training and norm == "batch"
    args = GluDepthwiseConv(x, weight, bias, lengths, *statistics, norm, num_groups, training, eps, activation)
    return apply(args, momentum)


def unsupported(traits: Traits) -> list[str]:
    return []


def forward(args: GluDepthwiseConv, save: bool, *, out: Tensor | None = None) -> tuple[Tensor, Statistics]:
    """Save the statistics of BatchNorm alone: the backward recomputes the forward under autograd."""
    y, real = _convolution(args)
    batch = _batch_statistics(y, real) if args.training else None
    finished = _finish(args, y, real, None, batch)
    out = finished.contiguous() if out is None else out.copy_(finished)
    nothing = y.new_empty((0,))
    if batch is not None:
        return out, Statistics(nothing, batch.mean, batch.var, batch.frames[None])
    if save and args.running_mean is not None and args.running_var is not None:
        return out, Statistics(nothing, args.running_mean.clone(), args.running_var.clone(), nothing)
    return out, Statistics(nothing, nothing, nothing, nothing)


def backward(
    dout: Tensor, args: GluDepthwiseConv, saved: Statistics, *, dx: Tensor | None = None, partial: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = [n for n in ("x", "weight", "norm_weight", "norm_bias") if getattr(args, n) is not None]
    leaves = {n: getattr(args, n).detach().requires_grad_() for n in names}
    bias = args.x.new_zeros(args.weight.shape[0]) if args.bias is None else args.bias.detach()
    leaves["bias"] = bias.requires_grad_()
    changed: dict[str, Any] = {**leaves, "running_mean": saved.mean, "running_var": saved.var}
    with torch.enable_grad():
        recomputed = apply(dataclasses.replace(args, **changed))
    of = dict(zip(leaves, torch.autograd.grad(recomputed, list(leaves.values()), dout)))
    dnorm = torch.stack((of["norm_bias"], of["norm_weight"])) if "norm_bias" in of else args.x.new_empty((0,))
    dx = of["x"] if dx is None else dx.copy_(of["x"])
    dweight, dbias = of["weight"].t(), of["bias"]
    if partial:
        return dx, dweight[None], dbias[None], dnorm[None]
    return dx, dweight, dbias, dnorm
