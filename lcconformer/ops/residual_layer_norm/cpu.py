"""residual_layer_norm on the CPU kernels of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..availability import cpu_reasons
from ..native import common, cpu_kernels, dropout, f32, pointer, rows_of
from .arguments import ResidualLayerNorm, Traits

__all__ = ["backward", "forward", "layer_norm", "layer_norm_backward", "unsupported"]


def unsupported(traits: Traits) -> list[str]:
    return cpu_reasons(traits.device, traits.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    w, b = f32(weight), f32(bias)
    cpu = cpu_kernels()
    launch = cpu.ResidualLayerNormForward(
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
    cpu.residual_layer_norm_forward(launch)
    return n.to(dtype), mean, rstd


def layer_norm_backward(
    dn: Tensor,
    ds: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    n: Tensor | None = None,
    dy: Tensor | None = None,
    alpha: float = 1.0,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    # the kernel writes in the dtype of s
    n_out, dy_out = (x if x is None or x.dtype == s.dtype else torch.empty_like(s) for x in (n, dy))
    dx, dparams = _backward(dn.to(s.dtype), ds, s, mean, rstd, weight, bias, n_out, dy_out, seed, alpha, dropout_p)
    for wanted, out in ((n, n_out), (dy, dy_out)):
        if wanted is not None and out is not None and out is not wanted:
            wanted.copy_(out)
    return dx, dparams[None]


def _backward(dn, ds, s, mean, rstd, weight, bias, n, dy, seed, alpha, dropout_p) -> tuple[Tensor, Tensor]:
    """Return (dx ``[M, D]``, (dweight, dbias) float32 ``[2, D]``) of rows; fill ``n`` and ``dy`` where given."""
    m, d = s.shape
    dx = s.new_empty((m, d))
    dparams = s.new_empty((2, d), dtype=torch.float32)
    w, b = f32(weight), f32(bias)
    cpu = cpu_kernels()
    launch = cpu.ResidualLayerNormBackward(
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
    cpu.residual_layer_norm_backward(launch)
    return dx, dparams


def forward(args: ResidualLayerNorm, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = args.x
    rows, branch = rows_of(x), rows_of(args.y.to(x.dtype))
    m, d = rows.shape
    s, n = x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((m,), dtype=torch.float32) for _ in range(2))
    w, b = f32(args.weight), f32(args.bias)
    cpu = cpu_kernels()
    launch = cpu.ResidualLayerNormForward(
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
        alpha=args.alpha,
        eps=args.eps,
        dropout=dropout(args.seed, args.dropout_p),
    )
    cpu.residual_layer_norm_forward(launch)
    return s, n if dtype is None else n.to(dtype), mean, rstd


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
    scaled = seed is not None or alpha != 1.0
    dy = s.new_empty(s.shape if scaled else (0,))
    dx, dparams = _backward(
        rows_of(dn),
        rows_of(ds),
        rows_of(s),
        mean,
        rstd,
        weight,
        None,
        None,
        dy if scaled else None,
        seed,
        alpha,
        dropout_p,
    )
    return dx.view(s.shape), dy, dparams.to(weight.dtype)
