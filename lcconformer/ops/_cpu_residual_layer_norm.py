"""residual_layer_norm on the CPU kernels; arguments and results as those of lcconformer.kernels.residual_layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cpu import common, cpu_kernels, dropout, f32, pointer, rows_of

__all__ = ["backward", "forward", "layer_norm", "layer_norm_backward"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(LN(x), mean, rstd) of rows ``[M, D]`` with unit stride in D; mean and rstd float32 ``[M]``."""
    n = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    w, b = f32(weight), f32(bias)
    cpu = cpu_kernels()
    args = cpu.ResidualLayerNormForward(
        **common(x),
        rows=x.shape[0],
        columns=x.shape[1],
        x=pointer(x),
        x_row_stride=x.stride(0),
        weight=pointer(w),
        bias=pointer(b),
        n=pointer(n),
        mean=pointer(mean),
        rstd=pointer(rstd),
        eps=eps,
    )
    cpu.residual_layer_norm_forward(args)
    return n, mean, rstd


def layer_norm_backward(
    dn: Tensor,
    ds: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    n: Tensor | None = None,
    dy: Tensor | None = None,
    seed: Tensor | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(dx ``[M, D]``, (dweight, dbias) ``[2, D]``) of rows; fills ``n`` (needs ``bias``) and ``dy`` where given."""
    m, d = s.shape
    dx = s.new_empty((m, d))
    dparams = s.new_empty((2, d), dtype=torch.float32)
    w, b = f32(weight), f32(bias)
    cpu = cpu_kernels()
    args = cpu.ResidualLayerNormBackward(
        **common(s),
        rows=m,
        columns=d,
        s=pointer(s),
        s_row_stride=s.stride(0),
        dn=pointer(dn),
        dn_row_stride=dn.stride(0),
        ds=pointer(ds),
        ds_row_stride=ds.stride(0),
        weight=pointer(w),
        bias=pointer(b),
        mean=pointer(mean),
        rstd=pointer(rstd),
        n=pointer(n),
        dx=pointer(dx),
        dy=pointer(dy),
        dparams=pointer(dparams),
        alpha=alpha,
        dropout=dropout(seed, dropout_p),
    )
    cpu.residual_layer_norm_backward(args)
    return dx, dparams.to(weight.dtype)


def forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    alpha: float,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, n) shaped like x, and mean, rstd: float32 ``[M]``."""
    rows, branch = rows_of(x), rows_of(y)
    m, d = rows.shape
    s, n = x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((m,), dtype=torch.float32) for _ in range(2))
    w, b = f32(weight), f32(bias)
    cpu = cpu_kernels()
    args = cpu.ResidualLayerNormForward(
        **common(x),
        rows=m,
        columns=d,
        x=pointer(rows),
        x_row_stride=rows.stride(0),
        y=pointer(branch),
        y_row_stride=branch.stride(0),
        weight=pointer(w),
        bias=pointer(b),
        s=pointer(s),
        n=pointer(n),
        mean=pointer(mean),
        rstd=pointer(rstd),
        alpha=alpha,
        eps=eps,
        dropout=dropout(seed, dropout_p),
    )
    cpu.residual_layer_norm_forward(args)
    return s, n, mean, rstd


def backward(
    ds: Tensor,
    dn: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    alpha: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, (dweight, dbias) ``[2, D]``); dy is empty where it equals dx (alpha = 1, no dropout)."""
    scaled = seed is not None or alpha != 1.0
    dy = s.new_empty(s.shape if scaled else (0,))
    dx, dparams = layer_norm_backward(
        rows_of(dn), rows_of(ds), rows_of(s), mean, rstd, weight,
        dy=dy if scaled else None, seed=seed, alpha=alpha, dropout_p=dropout_p,
    )  # fmt: skip
    return dx.view(s.shape), dy, dparams
