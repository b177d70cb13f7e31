"""The middle of the Conformer's convolution module: GLU, padding zeroed, depthwise convolution, norm, activation.

Gulati et al. 2020, figure 2.  Channels last throughout: ``[B, T, 2C] -> [B, T, C]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._backend import Reasons, forced_backend, select
from ._checks import check_lengths, check_same, check_shape, floats, frame_mask
from ._cpu import cpu_reasons
from ._cuda_glu_depthwise_conv import cuda_unsupported
from ._fused import fused_kernels
from ._triton import triton_reasons

__all__ = ["ACTIVATIONS", "glu_depthwise_conv", "glu_depthwise_conv_reference"]

OP = "glu_depthwise_conv"
NORMS = ("none", "layer", "batch", "group")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def _batch_norm(y, weight, bias, mean, var, real, training, momentum, eps):
    """Over real frames only; in training the running statistics follow as in ``nn.BatchNorm1d`` (unbiased variance)."""
    if training:
        x = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
        if real is None:
            count = torch.full((), x.shape[0] * x.shape[1], dtype=x.dtype, device=x.device)
            batch_mean = x.mean((0, 1))
            centred = x - batch_mean
        else:
            count = real.sum().to(x.dtype)
            batch_mean = x.masked_fill(~real, 0.0).sum((0, 1)) / count.clamp(min=1)
            centred = (x - batch_mean).masked_fill(~real, 0.0)
        batch_var = centred.square().sum((0, 1)) / count.clamp(min=1)
        with torch.no_grad():
            unbiased = batch_var * (count / (count - 1).clamp(min=1))
            # a batch without any real frame teaches nothing
            step = momentum * (count > 0).to(mean.dtype)
            mean.add_((batch_mean.to(mean.dtype) - mean) * step)
            var.add_((unbiased.to(var.dtype) - var) * step)
        mean, var = batch_mean, batch_var
    scale = weight * torch.rsqrt(var + eps).to(weight.dtype)
    return y * scale.to(y.dtype) + (bias - mean.to(bias.dtype) * scale).to(y.dtype)


def _group_norm(y, weight, bias, groups, real, eps):
    """Per utterance and group of channels, over the real frames."""
    b, t, c = y.shape
    x = (y.float() if y.dtype in (torch.float16, torch.bfloat16) else y).reshape(b, t, groups, c // groups)
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
    """The op in plain PyTorch: the oracle of every kernel, and the fallback."""
    _b, t, _ = x.shape
    c, k = weight.shape
    if t == 0:
        return F.glu(x, -1)
    real = None if lengths is None else frame_mask(lengths, t)[..., None]  # [B, T, 1]
    y = F.glu(x, -1)
    if real is not None:
        y = y.masked_fill(~real, 0.0)
    y = F.conv1d(y.transpose(1, 2), weight[:, None], bias, padding=k // 2, groups=c).transpose(1, 2)
    if norm == "layer":
        y = F.layer_norm(y, (c,), norm_weight, norm_bias, eps)
    elif norm == "batch":
        y = _batch_norm(y, norm_weight, norm_bias, running_mean, running_var, real, training, momentum, eps)
    elif norm == "group":
        y = _group_norm(y, norm_weight, norm_bias, num_groups, real, eps)
    return ACTIVATIONS[activation](y)


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
    check_shape(OP, "weight", weight, (None, None), "[C, K]")
    c, k = weight.shape
    if k % 2 == 0 or not 1 <= k <= 63:
        raise ValueError(f"{OP}: weight has K = {k}; expected an odd kernel size from 1 to 63")
    check_shape(OP, "x", x, (None, None, 2 * c), "[B, T, 2C]")
    if norm not in NORMS:
        raise ValueError(f"{OP}: norm is {norm!r}; expected one of {', '.join(NORMS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        check_shape(OP, "bias", bias, (c,), "[C]")
    check_same(OP, x=x, weight=weight, bias=bias)
    if norm != "none":
        for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if p is None:
                raise ValueError(f"{OP}: norm={norm!r} needs {name} [C]; got None")
            check_shape(OP, name, p, (c,), "[C]")
    if norm == "batch":
        for name, p in (("running_mean", running_mean), ("running_var", running_var)):
            if p is None:
                raise ValueError(f"{OP}: norm='batch' needs {name} [C]; got None")
            check_shape(OP, name, p, (c,), "[C]")
    if norm == "group" and (num_groups < 1 or c % num_groups):
        raise ValueError(f"{OP}: num_groups is {num_groups}; expected a divisor of C = {c}")
    given = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, p in given.items():
        if p is not None and p.device != x.device:
            raise ValueError(f"{OP}: {name} is on {p.device} but x is on {x.device}; move them to one device")
    check_lengths(OP, lengths, x.shape[0], x.shape[1], x.device)

    backend = backend_of(x, norm, norm_weight, training, activation)
    if backend == "torch":
        return glu_depthwise_conv_reference(
            x,
            weight,
            bias,
            lengths=lengths,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            running_mean=running_mean,
            running_var=running_var,
            num_groups=num_groups,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
    if norm == "none":
        norm_weight = norm_bias = None
    if norm != "batch":
        running_mean = running_var = None
    training = training and norm == "batch"
    tensors = (x, weight, bias, lengths, norm_weight, norm_bias, running_mean, running_var)
    (eps,) = floats(eps)
    options = (norm, num_groups, training, eps)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in tensors):
        out, mean, var, count = GluDepthwiseConvFn.apply(*tensors, *options, backend)
    else:
        out, _y, mean, var, count = torch.ops.lcconformer.glu_depthwise_conv_fwd(
            *tensors, *options, False, backend=backend
        )
    if training:
        update_running(running_mean, running_var, mean, var, count, momentum)
    return out


# --- fused -----------------------------------------------------------------------------------------------------------


def backend_of(x: Tensor, norm: str, norm_weight: Tensor | None, training: bool, activation: str) -> str:
    """The backend that serves these inputs; of their values nothing is used."""
    candidates: dict[str, Reasons] = {
        "triton": lambda: _triton_unsupported(x, norm, activation, norm_weight),
        "cpu": lambda: _cpu_unsupported(x, activation),
    }
    if forced_backend() == "cuda":
        # on demand until a GPU has measured it against Triton's
        candidates["cuda"] = lambda: cuda_unsupported(x, norm, training, activation)
    return select(OP, x.device.type, candidates)


def _cpu_unsupported(x: Tensor, activation: str) -> list[str]:
    reasons = cpu_reasons(x)
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    return reasons


# one program owns all channels of a frame
_MAX_LAYER_CHANNELS = 2048


def _triton_unsupported(x: Tensor, norm: str, activation: str, norm_weight: Tensor | None) -> list[str]:
    reasons = triton_reasons(x)
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    if norm == "layer" and x.shape[-1] > 2 * _MAX_LAYER_CHANNELS:
        reasons.append(f"norm='layer' is fused up to C = {_MAX_LAYER_CHANNELS}, got C = {x.shape[-1] // 2}")
    if norm != "none" and norm_weight is not None and norm_weight.dtype == torch.float64:
        reasons.append("norm_weight is float64")
    return reasons


@torch.no_grad()
def update_running(running_mean, running_var, mean, var, count, momentum=0.1):
    """As ``nn.BatchNorm1d``: unbiased variance; a batch without any real frame teaches nothing."""
    unbiased = var * (count / (count - 1).clamp(min=1))
    step = momentum * (count > 0).to(running_mean.dtype)
    running_mean.add_((mean.to(running_mean.dtype) - running_mean) * step)
    running_var.add_((unbiased.to(running_var.dtype) - running_var) * step)


torch.library.define(
    "lcconformer::glu_depthwise_conv_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? running_mean, Tensor? running_var, str norm, int num_groups, bool training, float eps, bool save, "
    "*, str backend='triton') "
    "-> (Tensor out, Tensor y, Tensor mean, Tensor var, Tensor count)",
)
torch.library.define(
    "lcconformer::glu_depthwise_conv_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor? lengths, Tensor? norm_weight, Tensor? norm_bias, Tensor y, "
    "Tensor mean, Tensor var, Tensor count, str norm, int num_groups, bool training, float eps, "
    "*, str backend='triton') "
    "-> (Tensor dx, Tensor dtaps, Tensor dbias, Tensor dnorm)",
)


@torch.library.impl("lcconformer::glu_depthwise_conv_fwd", ("CPU", "CUDA"))
def _fwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).forward(*args)


@torch.library.impl("lcconformer::glu_depthwise_conv_bwd", ("CPU", "CUDA"))
def _bwd(*args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    return fused_kernels(OP, backend).backward(*args)


@torch.library.register_fake("lcconformer::glu_depthwise_conv_fwd")
def _fwd_fake(
    x,
    weight,
    bias,
    lengths,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    norm,
    num_groups,
    training,
    eps,
    save,
    *,
    backend="triton",
):
    b, t, _ = x.shape
    c = weight.shape[0]
    stats = norm == "group" or (norm == "batch" and training)
    shape: tuple[int, ...] = (0,)
    if norm == "group":
        shape = (b, num_groups)
    elif norm == "batch" and (training or save):
        shape = (c,)
    mean, var = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    count = x.new_empty((1 if norm == "batch" and training else 0,), dtype=torch.float32)
    return x.new_empty((b, t, c)), x.new_empty((b, t, c) if save or stats else (0,)), mean, var, count


@torch.library.register_fake("lcconformer::glu_depthwise_conv_bwd")
def _bwd_fake(
    dout,
    x,
    weight,
    lengths,
    norm_weight,
    norm_bias,
    y,
    mean,
    var,
    count,
    norm,
    num_groups,
    training,
    eps,
    *,
    backend="triton",
):
    c, k = weight.shape
    dnorm = x.new_empty((0,)) if norm_weight is None else norm_weight.new_empty((2, c))
    return x.new_empty(x.shape), weight.new_empty((k, c)), weight.new_empty((c,)), dnorm


class GluDepthwiseConvFn(torch.autograd.Function):
    """Keeps the input and the convolution's output; the backward recomputes GLU, norm and SiLU."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        lengths,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        norm,
        num_groups,
        training,
        eps,
        backend,
    ):
        out, y, mean, var, count = torch.ops.lcconformer.glu_depthwise_conv_fwd(
            x, weight, bias, lengths, norm_weight, norm_bias, running_mean, running_var, norm, num_groups, training, eps, True,
            backend=backend,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, lengths, norm_weight, norm_bias, y, mean, var, count)
        ctx.options, ctx.backend = (norm, num_groups, training, eps), backend
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        dx, dtaps, dbias, dnorm = torch.ops.lcconformer.glu_depthwise_conv_bwd(
            dout, *ctx.saved_tensors, *ctx.options, backend=ctx.backend
        )
        dnorm_bias, dnorm_weight = dnorm if dnorm.numel() else (None, None)
        return (dx, dtaps.t(), dbias if ctx.has_bias else None, None, dnorm_weight, dnorm_bias, *[None] * 7)
