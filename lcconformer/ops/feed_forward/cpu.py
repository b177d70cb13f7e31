"""feed_forward on the CPU kernels of csrc/cpu around the GEMMs of a library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..availability import cpu_reasons
from ..gemm import matmul_transposed, weight_gradient
from ..native import common, cpu_kernels, dropout, f32, pointer, rows_of
from ..residual_layer_norm.cpu import layer_norm, layer_norm_backward
from .arguments import FeedForward, Traits

__all__ = ["activation", "activation_backward", "backward", "forward", "unsupported", "up", "up_backward"]

_HIDDEN, _OUTPUT = 0, 1  # dropout streams


def unsupported(traits: Traits) -> list[str]:
    reasons = cpu_reasons(traits.device, traits.dtype)
    if traits.dtype != traits.weight_dtype:
        reasons.append(f"x is {traits.dtype} and the weights are {traits.weight_dtype} (autocast)")
    return reasons


def activation(
    u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, name: str, *, overwrite: bool = False
) -> Tensor:
    """g = drop(act(u + b1)) of contiguous rows ``[M, F]``; in the memory of ``u`` if ``overwrite``."""
    m, f = u.shape
    g = u if overwrite else torch.empty_like(u)
    bias = f32(b1)
    cpu = cpu_kernels()
    launch = cpu.FeedForwardActivationForward(
        **common(u),
        rows=m,
        columns=f,
        dropout=dropout(seed, dropout_p),
        out=pointer(g),
        activation=getattr(cpu.Activation, name),
        u=pointer(u),
        bias=pointer(bias),
    )
    cpu.feed_forward_activation_forward(launch)
    return g


def activation_backward(
    dg: Tensor,
    u: Tensor,
    b1: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    name: str,
    *,
    du: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(du in the memory of ``dg`` unless given, g again ``[M, F]``, db1 float32 ``[F]``) of contiguous rows."""
    m, f = u.shape
    g = torch.empty_like(u) if g is None else g
    du = dg if du is None else du
    db1 = u.new_empty((f,), dtype=torch.float32)
    bias = f32(b1)
    cpu = cpu_kernels()
    launch = cpu.FeedForwardActivationBackward(
        **common(u),
        rows=m,
        columns=f,
        dropout=dropout(seed, dropout_p),
        out=pointer(du),
        activation=getattr(cpu.Activation, name),
        u=pointer(u),
        d=pointer(dg),
        bias=pointer(bias),
        g=pointer(g),
        dbias=pointer(db1),
    )
    cpu.feed_forward_activation_backward(launch)
    return du, g, db1


def up(
    h: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, name: str
) -> tuple[Tensor, Tensor]:
    """(u = h W1', g = drop(act(u + b1))), ``[M, F]``, of rows h ``[M, D]``."""
    u = matmul_transposed(h, w1)
    return u, activation(u, b1, seed, dropout_p, name)


def up_backward(
    dz: Tensor,
    w2: Tensor,
    u: Tensor,
    b1: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    name: str,
    *,
    du: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, g again ``[M, F]``, db1 float32 ``[1, F]``) from the gradient dz ``[M, D]`` of z = g W2'."""
    du, g, db1 = activation_backward(matmul_transposed(dz, w2.t()), u, b1, seed, dropout_p, name, du=du, g=g)
    return du, g, db1[None]


def forward(args: FeedForward, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, seed = args.x, args.seed
    rows = rows_of(x)
    m, d = rows.shape
    h, mean, rstd = layer_norm(rows, args.norm_weight, args.norm_bias, args.eps, x.dtype)
    u = matmul_transposed(h, args.w1)
    g = activation(u, args.b1, seed, args.dropout_p, args.activation, overwrite=not save)
    z = matmul_transposed(g, args.w2)
    out = x.new_empty(x.shape)
    bias = f32(args.b2)
    cpu = cpu_kernels()
    launch = cpu.FeedForwardResidualForward(
        **common(x),
        rows=m,
        columns=d,
        u=pointer(z),
        bias=pointer(bias),
        x=pointer(rows),
        x_row_stride=rows.stride(0),
        out=pointer(out),
        scale=args.scale,
        dropout=dropout(seed, args.dropout_p),
    )
    cpu.feed_forward_residual_forward(launch)
    if not save:
        mean, rstd, u = (t.new_empty((0,)) for t in (mean, rstd, u))
    return out, mean, rstd, u


def backward(
    dout: Tensor, args: FeedForward, mean: Tensor, rstd: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, w1, w2, seed, dropout_p = args.x, args.w1, args.w2, args.seed, args.dropout_p
    rows, drows = rows_of(x), rows_of(dout)
    m, d = rows.shape
    dz = x.new_empty((m, d))
    db2 = x.new_empty((d,), dtype=torch.float32)
    cpu = cpu_kernels()
    launch = cpu.FeedForwardResidualBackward(
        **common(x),
        rows=m,
        columns=d,
        d=pointer(drows),
        d_row_stride=drows.stride(0),
        out=pointer(dz),
        dbias=pointer(db2),
        scale=args.scale,
        dropout=dropout(seed, dropout_p),
    )
    cpu.feed_forward_residual_backward(launch)
    du, g, db1 = activation_backward(matmul_transposed(dz, w2.t()), u, args.b1, seed, dropout_p, args.activation)
    dw2 = weight_gradient(dz, g)
    del g
    dh = matmul_transposed(du, w1.t())
    h = torch.empty_like(dh)
    dx, dnorm = layer_norm_backward(dh, drows, rows, mean, rstd, args.norm_weight, args.norm_bias, n=h)
    dw1 = weight_gradient(du, h)
    return dx.view(x.shape), dnorm[0].to(args.norm_weight.dtype), dw1, db1.to(w1.dtype), dw2, db2.to(w2.dtype)
