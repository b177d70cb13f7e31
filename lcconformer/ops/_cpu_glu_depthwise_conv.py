"""glu_depthwise_conv on the CPU kernels; arguments and results as those of lcconformer.kernels.glu_depthwise_conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._cpu import f32, i64, pointer, run, unit_stride

__all__ = ["backward", "forward"]

_NONE, _LAYER, _RUNNING, _BATCH, _GROUP = range(5)  # enum Norm of csrc/cpu/kernels.h


def _norm(norm: str, training: bool) -> int:
    if norm == "batch":
        return _BATCH if training else _RUNNING
    return {"none": _NONE, "layer": _LAYER, "group": _GROUP}[norm]


def _fields(x, taps, lengths, norm_weight, norm_bias, mode, num_groups, eps) -> dict[str, Any]:
    """The caller keeps the tensors alive."""
    b, t, _ = x.shape
    k, c = taps.shape
    return {
        "x": pointer(x),
        "x_stride_b": x.stride(0),
        "x_stride_t": x.stride(1),
        "taps": pointer(taps),
        "lengths": pointer(lengths),
        "norm": mode,
        "norm_weight": pointer(norm_weight),
        "norm_bias": pointer(norm_bias),
        "B": b,
        "T": t,
        "C": c,
        "K": k,
        "groups": num_groups,
        "eps": eps,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, y [B, T, C], mean, var, count): y is the convolution before the norm, kept if ``save``.

    mean, var: float32 ``[C]`` (batch) or ``[B, G]`` (group); count: float32 ``[1]``, real frames of the batch.
    """
    b, t, _ = x.shape
    c = weight.shape[0]
    mode = _norm(norm, training)
    x, taps, lengths = unit_stride(x), f32(weight.t()), i64(lengths)
    bias, norm_weight, norm_bias = f32(bias), f32(norm_weight), f32(norm_bias)
    out = x.new_empty((b, t, c))
    y = x.new_empty((b, t, c) if save or mode in (_BATCH, _GROUP) else (0,))
    mean, var, count = (x.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if mode == _BATCH:
        mean, var, count = (x.new_empty((n,), dtype=torch.float32) for n in (c, c, 1))
    elif mode == _GROUP:
        mean, var = (x.new_empty((b, num_groups), dtype=torch.float32) for _ in range(2))
    elif running_mean is not None and running_var is not None:
        mean, var = (s.to(torch.float32, copy=True) for s in (running_mean, running_var))
    run(
        "conv_forward",
        x,
        **_fields(x, taps, lengths, norm_weight, norm_bias, mode, num_groups, eps),
        bias=pointer(bias),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        out=pointer(out),
        y=pointer(y) if y.dim() == 3 else 0,
    )
    if mode == _RUNNING and not save:
        mean, var = (x.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return out, y, mean, var, count


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    norm: str,
    num_groups: int,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [B, T, 2C], dweight [K, C] (transposed), dbias [C], (dnorm_bias, dnorm_weight) [2, C] or empty)."""
    c, k = weight.shape
    mode = _norm(norm, training)
    x, dout, taps, lengths = unit_stride(x), unit_stride(dout), f32(weight.t()), i64(lengths)
    scale, shift = f32(norm_weight), f32(norm_bias)
    dx = x.new_empty(x.shape)
    dtaps, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in ((k, c), (c,)))
    dnorm = x.new_empty((0,) if norm_weight is None else (2, c), dtype=torch.float32)
    run(
        "conv_backward",
        x,
        **_fields(x, taps, lengths, scale, shift, mode, num_groups, eps),
        y=pointer(y),
        mean=pointer(mean),
        var=pointer(var),
        count=pointer(count),
        dout=pointer(dout),
        dout_stride_b=dout.stride(0),
        dout_stride_t=dout.stride(1),
        dx=pointer(dx),
        dtaps=pointer(dtaps),
        dbias=pointer(dbias),
        dnorm=pointer(dnorm),
    )
    dnorm = dnorm.to(x.dtype if norm_weight is None else norm_weight.dtype)
    return dx, dtaps.to(weight.dtype), dbias.to(weight.dtype), dnorm
