"""The kernels of the ops that training calls, in plain PyTorch: same names, arguments and results as the fused ones.

Gradients come from autograd on a recomputed forward: for float64 and for tests, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer.ops.glu_depthwise_conv import glu_depthwise_conv_reference
from lcconformer.ops.relpos_attention import relpos_attention_reference

__all__ = ["drawn_from", "feed_forward", "glu_depthwise_conv", "relpos_attention", "residual_layer_norm"]


@contextmanager
def drawn_from(seed: Tensor | None) -> Iterator[None]:
    """``F.dropout`` inside draws the same masks for the same seed; on a GPU this waits for the seed's value."""
    if seed is None:
        yield
        return
    on_gpu = seed.device.type == "cuda"
    generator = torch.cuda.default_generators[seed.device.index] if on_gpu else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(seed))
    try:
        yield
    finally:
        generator.set_state(state)


class residual_layer_norm:
    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
        return n, mean.flatten(), rstd.flatten()

    @staticmethod
    def forward(x, y, weight, bias, seed, alpha, dropout_p, eps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with drawn_from(seed):
            s = x.contiguous() + alpha * F.dropout(y, dropout_p)
        return s, *residual_layer_norm.layer_norm(s, weight, bias, eps)

    @staticmethod
    def layer_norm_backward(
        dn, ds, s, mean, rstd, weight, bias=None, *, n=None, dy=None, seed=None, alpha=1.0, dropout_p=0.0
    ) -> tuple[Tensor, Tensor]:
        mean, rstd = mean[:, None], rstd[:, None]
        normal = (s - mean) * rstd
        if n is not None:
            n.copy_(normal * weight + bias)
        grad = dn * weight
        dx = grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True)
        dx = (dx * rstd + ds).to(s.dtype)
        if dy is not None:
            with drawn_from(seed):
                dy.copy_(F.dropout(alpha * dx, dropout_p))
        return dx, torch.stack(((dn * normal).sum(0), dn.sum(0))).to(weight.dtype)


class feed_forward:
    @staticmethod
    def up(h, w1, b1, seed, dropout_p) -> tuple[Tensor, Tensor]:
        u = F.linear(h, w1)
        return u, feed_forward._activation(u, b1, seed, dropout_p)

    @staticmethod
    def up_backward(dz, w2, u, b1, seed, dropout_p) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            g = feed_forward._activation(leaf, b1, seed, dropout_p)
        (du,) = torch.autograd.grad(g, leaf, F.linear(dz, w2.t()))
        return du, g.detach(), du.sum(0)

    @staticmethod
    def _activation(u: Tensor, b1: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
        with drawn_from(seed):
            return F.dropout(F.silu(u if b1 is None else u + b1), dropout_p)


class relpos_attention:
    @staticmethod
    def forward(q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, dropout_p) -> tuple[Tensor, Tensor]:
        with drawn_from(seed):
            out = relpos_attention_reference(q, k, v, pos, u, v_bias, lengths=lengths, dropout_p=dropout_p)
        return out.contiguous(), q.new_empty((0,))

    @staticmethod
    def backward(dout, q, k, v, pos, u, v_bias, lengths, cu_seqlens, seed, out, lse, dropout_p) -> tuple[Tensor, ...]:
        with torch.enable_grad(), drawn_from(seed):
            leaves = [x.detach().requires_grad_() for x in (q, k, v, pos, u, v_bias)]
            again = relpos_attention_reference(*leaves, lengths=lengths, dropout_p=dropout_p)
        return torch.autograd.grad(again, leaves, dout)


class glu_depthwise_conv:
    """As :meth:`~lcconformer.loop.steps.Steps.convolve` and ``convolve_again``: autograd needs no statistics handed over."""

    @staticmethod
    def forward(p: Tensor, conv: Any, update: bool) -> Tensor:
        mean, var = conv.running_mean, conv.running_var
        if conv.training and not update:
            mean, var = mean.clone(), var.clone()
        return glu_depthwise_conv_reference(
            p,
            conv.weight,
            conv.bias,
            lengths=conv.lengths,
            norm=conv.norm,
            norm_weight=conv.norm_weight,
            norm_bias=conv.norm_bias,
            running_mean=mean,
            running_var=var,
            num_groups=conv.groups,
            training=conv.training,
            eps=conv.eps,
        )

    @staticmethod
    def again(p: Tensor, conv: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
        names = [n for n in ("weight", "bias", "norm_weight", "norm_bias") if getattr(conv, n) is not None]
        with torch.enable_grad():
            x = p.detach().requires_grad_()
            leaves = {n: getattr(conv, n).detach().requires_grad_() for n in names}
            c = glu_depthwise_conv.forward(x, conv._replace(**leaves), update=False)

        def backward(dout: Tensor) -> tuple[Any, ...]:
            dx, *grads = torch.autograd.grad(c, [x, *leaves.values()], dout)
            of = dict(zip(names, grads))
            dnorm = torch.stack((of["norm_bias"], of["norm_weight"])) if "norm_bias" in of else x.new_empty((0,))
            return dx, of["weight"].t(), of.get("bias"), dnorm

        return c.detach(), backward
