"""feed_forward in plain PyTorch: the oracle of every kernel, and the fallback."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import ACTIVATIONS
from ..dropout import drawn_from
from .arguments import FeedForward, Traits

__all__ = ["apply", "backward", "feed_forward_reference", "forward", "unsupported", "up", "up_backward"]


def feed_forward_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    scale: float = 0.5,
    activation: str = "silu",
    dropout_p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Differentiable feed-forward with the signature of :func:`~lcconformer.ops.feed_forward`."""
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    h = F.dropout(ACTIVATIONS[activation](F.linear(h, w1, b1)), dropout_p)  # [B, T, F]
    return x + scale * F.dropout(F.linear(h, w2, b2), dropout_p)


def apply(args: FeedForward) -> Tensor:
    """Run the differentiable reference; dropout draws from PyTorch's generator."""
    return feed_forward_reference(
        args.x, args.norm_weight, args.norm_bias, args.w1, args.b1, args.w2, args.b2,
        scale=args.scale, activation=args.activation, dropout_p=args.dropout_p, eps=args.eps,
    )  # fmt: skip


def unsupported(traits: Traits) -> list[str]:
    return []


def forward(args: FeedForward, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Save nothing but the inputs: the backward recomputes the forward under autograd."""
    with drawn_from(args.seed):
        out = apply(args).contiguous()
    mean, rstd, u = (args.x.new_empty((0,)) for _ in range(3))
    return out, mean, rstd, u


def backward(
    dout: Tensor, args: FeedForward, mean: Tensor, rstd: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    names = [n for n in ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2") if getattr(args, n) is not None]
    leaves: dict[str, Any] = {n: getattr(args, n).detach().requires_grad_() for n in names}
    with torch.enable_grad(), drawn_from(args.seed):
        again = apply(dataclasses.replace(args, **leaves))
    of = dict(zip(names, torch.autograd.grad(again, list(leaves.values()), dout)))
    f, d = args.w1.shape
    db1, db2 = (of.get(name, args.w1.new_empty((n,))) for name, n in (("b1", f), ("b2", d)))
    return of["x"], torch.stack((of["norm_weight"], of["norm_bias"])), of["w1"], db1, of["w2"], db2


def up(
    h: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str
) -> tuple[Tensor, Tensor]:
    u = F.linear(h, w1)
    return u, _activation(u, b1, seed, dropout_p, activation)


def up_backward(
    dz: Tensor,
    w2: Tensor,
    u: Tensor,
    b1: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
    *,
    du: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        again = _activation(leaf, b1, seed, dropout_p, activation)
    (gradient,) = torch.autograd.grad(again, leaf, F.linear(dz, w2.t()))
    du = gradient if du is None else du.copy_(gradient)
    g = again.detach() if g is None else g.copy_(again.detach())
    return du, g, du.sum(0)[None]


def _activation(u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str) -> Tensor:
    with drawn_from(seed):
        return F.dropout(ACTIVATIONS[activation](u if b1 is None else u + b1), dropout_p)
