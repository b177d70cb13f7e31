"""feed_forward on the CPU kernels around library products; as lcconformer.kernels.feed_forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cpu import common, cpu_kernels, dropout, f32, pointer, rows_of
from ._cpu_linear import matmul_transposed, weight_gradient
from ._cpu_residual_layer_norm import layer_norm, layer_norm_backward

__all__ = ["activation", "activation_backward", "backward", "forward", "up", "up_backward"]


def activation(
    u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, *, overwrite: bool = False
) -> Tensor:
    """g = drop(silu(u + b1)) of contiguous rows ``[M, F]``; in the memory of ``u`` if ``overwrite``."""
    m, f = u.shape
    g = u if overwrite else torch.empty_like(u)
    bias = f32(b1)
    cpu = cpu_kernels()
    args = cpu.FeedForwardActivationForward(
        **common(u),
        rows=m,
        columns=f,
        dropout=dropout(seed, dropout_p),
        out=pointer(g),
        u=pointer(u),
        bias=pointer(bias),
    )
    cpu.feed_forward_activation_forward(args)
    return g


def activation_backward(
    dg: Tensor, u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(du in the memory of ``dg``, g again ``[M, F]``, db1 float32 ``[F]``) of contiguous rows."""
    m, f = u.shape
    g = torch.empty_like(u)
    db1 = u.new_empty((f,), dtype=torch.float32)
    bias = f32(b1)
    cpu = cpu_kernels()
    args = cpu.FeedForwardActivationBackward(
        **common(u),
        rows=m,
        columns=f,
        dropout=dropout(seed, dropout_p),
        out=pointer(dg),
        u=pointer(u),
        d=pointer(dg),
        bias=pointer(bias),
        g=pointer(g),
        dbias=pointer(db1),
    )
    cpu.feed_forward_activation_backward(args)
    return dg, g, db1


def up(h: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(u = h W1', g = drop(silu(u + b1))), ``[M, F]``, of rows h ``[M, D]``."""
    u = matmul_transposed(h, w1)
    return u, activation(u, b1, seed, dropout_p)


def up_backward(
    dz: Tensor, w2: Tensor, u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, g again ``[M, F]``, db1 float32 ``[F]``) from the gradient dz ``[M, D]`` of z = g W2'."""
    return activation_backward(matmul_transposed(dz, w2.t()), u, b1, seed, dropout_p)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out like x, mean [M], rstd [M] float32, u [M, F] = LN(x) W1'); the last three empty unless ``save``."""
    rows = rows_of(x)
    m, d = rows.shape
    h, mean, rstd = layer_norm(rows, norm_weight, norm_bias, eps)
    u = matmul_transposed(h, w1)
    g = activation(u, b1, seed, dropout_p, overwrite=not save)
    z = matmul_transposed(g, w2)
    out = x.new_empty(x.shape)
    bias = f32(b2)
    cpu = cpu_kernels()
    args = cpu.FeedForwardResidualForward(
        **common(x),
        rows=m,
        columns=d,
        dropout=dropout(seed, dropout_p),
        out=pointer(out),
        u=pointer(z),
        bias=pointer(bias),
        x=pointer(rows),
        x_row_stride=rows.stride(0),
        scale=scale,
    )
    cpu.feed_forward_residual_forward(args)
    if not save:
        mean, rstd, u = (t.new_empty((0,)) for t in (mean, rstd, u))
    return out, mean, rstd, u


def backward(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    mean: Tensor,
    rstd: Tensor,
    u: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, (dnorm_weight, dnorm_bias) [2, D], dw1, db1, dw2, db2)"""
    rows, drows = rows_of(x), rows_of(dout)
    m, d = rows.shape
    dz = x.new_empty((m, d))
    db2 = x.new_empty((d,), dtype=torch.float32)
    cpu = cpu_kernels()
    args = cpu.FeedForwardResidualBackward(
        **common(x),
        rows=m,
        columns=d,
        dropout=dropout(seed, dropout_p),
        out=pointer(dz),
        d=pointer(drows),
        d_row_stride=drows.stride(0),
        dbias=pointer(db2),
        scale=scale,
    )
    cpu.feed_forward_residual_backward(args)
    du, g, db1 = up_backward(dz, w2, u, b1, seed, dropout_p)
    dw2 = weight_gradient(dz, g)
    del g
    dh = matmul_transposed(du, w1.t())
    h = torch.empty_like(dh)
    dx, dnorm = layer_norm_backward(dh, drows, rows, mean, rstd, norm_weight, norm_bias, n=h)
    dw1 = weight_gradient(du, h)
    return dx.view(x.shape), dnorm, dw1, db1.to(w1.dtype), dw2, db2.to(w2.dtype)
