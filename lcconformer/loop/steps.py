"""The steps of a layer between its matrix products: one interface over the kernels of the ops, whatever the backend.

R is the dtype of the residual stream, C that of the products; they differ under autocast only.  M rows are B*T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lcconformer.ops._cpu_linear import matmul_transposed
from lcconformer.ops._fused import fused_kernels

from . import reference

if TYPE_CHECKING:
    from lcconformer.config import ConformerConfig

__all__ = ["Convolution", "Norm", "Steps", "linear", "rows_of", "steps_for"]

linear = matmul_transposed

# the modules, not the functions of the same names
feed_forward, glu_depthwise_conv, relpos_attention, residual_layer_norm = (
    import_module(f"lcconformer.ops.{op}")
    for op in ("feed_forward", "glu_depthwise_conv", "relpos_attention", "residual_layer_norm")
)


def rows_of(x: Tensor) -> Tensor:
    """``[B, T, D] -> [M, D]``, a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Norm(NamedTuple):
    """A LayerNorm: parameters ``[D]`` in the accumulation dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


class Convolution(NamedTuple):
    """The middle of the convolution module, as :func:`~lcconformer.ops.glu_depthwise_conv` takes it."""

    weight: Tensor  # [C, K]
    bias: Tensor | None
    lengths: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    norm: str
    groups: int
    training: bool
    eps: float


def _kernels(op: str, backend: str) -> Any:
    return getattr(reference, op) if backend == "torch" else fused_kernels(op, backend)


@dataclass(frozen=True)
class Steps:
    """The backend of each op, and what is called of it.

    Attributes:
        attention, convolution, feed_forward, norm: backends, as the ops choose them.
        dtype: C.
    """

    attention: str
    convolution: str
    feed_forward: str
    norm: str
    dtype: torch.dtype

    @property
    def backends(self) -> tuple[str, ...]:
        return self.attention, self.convolution, self.feed_forward, self.norm

    def layer_norm(self, x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(LN(x) ``[M, D]`` in ``dtype``, mean, rstd ``[M]``) of rows."""
        options = (dtype,) if self.norm == "triton" else ()
        n, mean, rstd = _kernels("residual_layer_norm", self.norm).layer_norm(x, *norm, *options)
        return n.to(dtype), mean, rstd

    def residual_norm(
        self, x: Tensor, y: Tensor, norm: Norm, alpha: float, seed: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(s = x + alpha * drop(y), LN(s), both like x, mean, rstd ``[M]``) of x in R and ``y [M, D]`` in C."""
        y = y if self.norm == "triton" else y.to(x.dtype)
        kernels = _kernels("residual_layer_norm", self.norm)
        return kernels.forward(x, y, norm.weight, norm.bias, seed, alpha, dropout_p, norm.eps)

    def residual_norm_backward(
        self,
        dn: Tensor,
        ds: Tensor,
        s: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        alpha: float = 1.0,
        seed: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        again: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """(dx in R, dy in C, LN(s) in C if ``again``, (dweight, dbias) ``[2, D]``) of rows; dy is None where it equals dx."""
        # Triton's kernel casts as it reads and writes
        like = self.dtype if self.norm == "triton" else s.dtype
        dn = dn if self.norm == "triton" else dn.to(s.dtype)
        n = torch.empty_like(s, dtype=like) if again else None
        dy = None if alpha == 1.0 and seed is None else torch.empty_like(s, dtype=like)
        dx, dparams = _kernels("residual_layer_norm", self.norm).layer_norm_backward(
            dn, ds, s, mean, rstd, norm.weight, norm.bias, n=n, dy=dy, seed=seed, alpha=alpha, dropout_p=dropout_p
        )
        return dx, None if dy is None else dy.to(self.dtype), None if n is None else n.to(self.dtype), dparams

    def up(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """(u = h weight', drop(silu(u + bias))), ``[M, F]``, of ``h [M, D]``."""
        return _kernels("feed_forward", self.feed_forward).up(h, weight, bias, seed, dropout_p)

    def up_backward(
        self, dz: Tensor, down: Tensor, u: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(du, drop(silu(u + bias)) again ``[M, F]``, dbias ``[F]``) from ``dz [M, D]`` behind the matrix ``down [D, F]``."""
        return _kernels("feed_forward", self.feed_forward).up_backward(dz, down, u, bias, seed, dropout_p)

    def attend(self, qkv: Tensor, *positions: Tensor, lengths, seed, dropout_p) -> tuple[Tensor, Tensor]:
        """(output ``[B, T, H, D]``, what the backward wants of the softmax) of ``qkv [B, T, 3, H, D]``."""
        kernels = _kernels("relpos_attention", self.attention)
        return kernels.forward(*qkv.unbind(2), *positions, lengths, None, seed, dropout_p)

    def attend_backward(
        self, dout: Tensor, qkv: Tensor, *positions: Tensor, lengths, seed, out, lse, dropout_p
    ) -> tuple[Tensor, ...]:
        """Gradients of queries, keys, values ``[B, T, H, D]``, of pos, u and v_bias."""
        kernels = _kernels("relpos_attention", self.attention)
        return kernels.backward(dout, *qkv.unbind(2), *positions, lengths, None, seed, out, lse, dropout_p)

    def convolve(self, p: Tensor, conv: Convolution, *, update: bool) -> Tensor:
        """``[B, T, 2C] -> [B, T, C]``; ``update`` moves the running statistics of a training BatchNorm."""
        if self.convolution == "torch":
            return reference.glu_depthwise_conv.forward(p, conv, update)
        kernels = fused_kernels("glu_depthwise_conv", self.convolution)
        out, _y, mean, var, count = kernels.forward(p, *conv, False)
        if update and conv.training:
            glu_depthwise_conv.update_running(conv.running_mean, conv.running_var, mean, var, count)
        return out

    def convolve_again(self, p: Tensor, conv: Convolution) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
        """(:meth:`convolve` again, its backward: dout to (dp, dweight ``[K, C]``, dbias, (dnorm_bias, dnorm_weight)))."""
        if self.convolution == "torch":
            return reference.glu_depthwise_conv.again(p, conv)
        kernels = fused_kernels("glu_depthwise_conv", self.convolution)
        out, y, mean, var, count = kernels.forward(p, *conv, True)

        def backward(dout: Tensor) -> tuple[Any, ...]:
            inputs = (p, conv.weight, conv.lengths, conv.norm_weight, conv.norm_bias, y, mean, var, count)
            return kernels.backward(dout, *inputs, conv.norm, conv.groups, conv.training, conv.eps)

        return out, backward


def steps_for(config: ConformerConfig, x: Tensor, dtype: torch.dtype, norm_weight: Tensor, training: bool) -> Steps:
    """What serves a layer of inputs ``x [B, T, D]`` and products in ``dtype``, chosen as its ops choose.

    Args:
        norm_weight: of any norm of the layer.
        training: whether BatchNorm uses the statistics of the batch.

    Raises:
        NotImplementedError: as the ops do, where a backend is forced.
    """
    b, t, d = x.shape
    nothing = x.new_empty((), dtype=dtype)
    heads = nothing.expand(b, t, config.num_heads, d // config.num_heads)
    activation, weight = config.activation, nothing.expand(config.ffn_dim, d)
    conv = (nothing.expand(b, t, 2 * d), config.conv_norm, norm_weight, training, activation)
    return Steps(
        attention=relpos_attention.backend_of(heads),
        convolution=glu_depthwise_conv.backend_of(*conv),
        feed_forward=feed_forward.backend_of(nothing.expand(b, t, d), norm_weight, weight, activation),
        norm=residual_layer_norm.backend_of(x, norm_weight),
        dtype=dtype,
    )
