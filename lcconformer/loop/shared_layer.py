"""One layer, forward and backward by hand: a norm, then four times a branch, its residual addition and the next norm.

    n_0 = LN(x_0);    y_r = branch_r(n_r),  x_(r+1) = x_r + alpha_r drop(y_r),  n_(r+1) = LN(x_(r+1)),  r = 0 ... 3

The branches are feed-forward, attention, convolution (or convolution, attention), feed-forward; n_4 is the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lcconformer.ops.gemm import matmul_transposed
from lcconformer.ops.glu_depthwise_conv import GluDepthwiseConv, update_running
from lcconformer.ops.native import rows_of
from lcconformer.ops.relpos_attention import RelposAttention
from lcconformer.ops.residual_layer_norm import ResidualLayerNorm
from lcconformer.packing import Layout, Packing, padded

from .kernels import Kernels

if TYPE_CHECKING:
    from lcconformer.layer import ConformerLayer

    from .gradients import Gradients

__all__ = ["KEPT", "LAST", "SEEDS", "Plan", "SharedLayer", "plan_of"]

_ALPHAS = (0.5, 1.0, 1.0, 0.5)
# the matrix that a branch applies to its normalised input
_FIRST = {"ffn1": "ffn1.up", "attention": "attention.qkv", "conv": "conv.pointwise1", "ffn2": "ffn2.up"}
# the one that it applies last
_LAST = {"ffn1": "ffn1.down", "attention": "attention.out", "conv": "conv.pointwise2", "ffn2": "ffn2.down"}
# tensors a branch keeps: the up-projection; queries, keys and values, and softmax; values and gates
_KEPT = {"ffn1": 1, "attention": 2, "conv": 1, "ffn2": 1}

# tensors a loop keeps: statistics of n_0; x, its statistics, and those of a branch
KEPT = 2 + 4 * 3 + sum(_KEPT.values())
LAST = -3  # index of the last residual sum among them
SEEDS = 8  # of a loop: inside each branch, and on each branch


@dataclass(frozen=True)
class Plan:
    """A layer without its parameters.

    Attributes:
        branches: in order.
        names: of the parameters, and of the statistics of a BatchNorm in evaluation, as :class:`SharedLayer` takes them.
        heads: of attention.
        eps: of the norms in front of each branch, and of the last one.
        inside, on: dropout probability inside of and on each branch.
        activation: of feed-forwards and convolution.
        norm, groups, conv_training, conv_eps, momentum: of the convolution.
        masked: whether the convolution gets the lengths.
        framewise: whether its norm looks at one frame at a time.
        reach: frames that the convolution sees on either side.
        statistics: running mean, running variance and counter of a BatchNorm in training, which are updated.
    """

    branches: tuple[str, ...]
    names: tuple[str, ...]
    heads: int
    eps: tuple[float, ...]
    inside: tuple[float, ...]
    on: tuple[float, ...]
    activation: str
    norm: str
    groups: int
    conv_training: bool
    conv_eps: float
    momentum: float
    masked: bool
    framewise: bool
    reach: int
    statistics: tuple[Tensor | None, ...]

    def dtypes(self, products: torch.dtype) -> list[torch.dtype]:
        """Return the dtypes in which :class:`SharedLayer` takes the parameters: norms in that of accumulation."""
        wide = torch.float64 if products == torch.float64 else torch.float32
        return [wide if "norm." in name else products for name in self.names]


def plan_of(layer: ConformerLayer) -> Plan:
    """Return what the modules of ``layer`` would do in their present modes."""
    branches = (
        ("ffn1", "conv", "attention", "ffn2") if layer.convolution_first else ("ffn1", "attention", "conv", "ffn2")
    )
    ffn1, attention, conv, ffn2 = layer.ffn1, layer.attention, layer.conv, layer.ffn2
    norm: Any = conv.depthwise_norm
    batch = isinstance(norm, nn.BatchNorm1d)
    trained = batch and norm.training
    names = [n for n, _ in layer.named_parameters(remove_duplicate=False) if n != "attention.pos.weight"]
    statistics: tuple[Tensor | None, ...] = (None, None, None)
    if trained:
        statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    elif batch:
        names += ["conv.depthwise_norm.running_mean", "conv.depthwise_norm.running_var"]
    p = {n: m.dropout if m.training else 0.0 for n, m in (("ffn1", ffn1), ("attention", attention), ("ffn2", ffn2))}
    residual = layer.dropout if layer.training else 0.0
    norms: list[Any] = [layer.get_submodule(f"{b}.norm") for b in branches]
    return Plan(
        branches=branches,
        names=tuple(names),
        heads=attention.heads,
        eps=(*(n.eps for n in norms), layer.norm.eps),
        inside=tuple(p.get(b, 0.0) for b in branches),
        on=(p["ffn1"], residual, residual, p["ffn2"]),
        activation=conv.config.activation,
        norm=conv.config.conv_norm,
        groups=conv.config.conv_norm_groups,
        conv_training=trained,
        conv_eps=getattr(norm, "eps", 0.0),
        momentum=norm.momentum if trained else 0.0,
        masked=conv.config.padding == "masked",
        framewise=conv.config.conv_norm != "group" and not trained,
        reach=conv.config.conv_kernel_size // 2,
        statistics=statistics,
    )


class Norm(NamedTuple):
    """A LayerNorm: parameters ``[D]`` in the accumulation dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


class SharedLayer:
    """A layer bound to the tensors of one call.

    Args:
        plan, kernels: what to do and by which kernels.
        lengths: ``[B]`` or None; or what is known of a packed batch, whose inputs are ``[1, total, D]``.
        pos: projected positions ``[2T-1, H, D]`` in C.
        parameters: of ``plan.names``, in the dtypes that :meth:`Plan.dtypes` gives.
    """

    def __init__(
        self, plan: Plan, kernels: Kernels, lengths: Tensor | Packing | None, pos: Tensor, parameters: list[Tensor]
    ) -> None:
        self.plan, self.kernels, self.lengths = plan, kernels, lengths
        # how the convolution takes a packed batch
        self._layout: Layout | None = None
        of_conv = lengths if plan.masked else None
        if isinstance(lengths, Packing):
            self._layout = lengths.apart(plan.reach) if plan.framewise else lengths.padded()
            of_conv = self._layout.lengths
        self._dtype = kernels.dtype
        self._weights = dict(zip(plan.names, parameters))
        names = [*(f"{b}.norm" for b in plan.branches), "norm"]
        self._norm_names = names
        self._norms = [
            Norm(self._weights[f"{n}.weight"], self._weights[f"{n}.bias"], eps) for n, eps in zip(names, plan.eps)
        ]
        self._positions = (pos, self._weights["attention.u"], self._weights["attention.v_bias"])
        mean, var, self._batches = plan.statistics
        of_norm = "conv.depthwise_norm."
        self._running = (mean, var)
        # x is that of a loop
        self._conv = GluDepthwiseConv(
            x=pos,
            weight=self._weights["conv.depthwise.weight"][:, 0],
            bias=self._weights.get("conv.depthwise.bias"),
            lengths=padded(of_conv),
            norm_weight=self._weights.get(f"{of_norm}weight"),
            norm_bias=self._weights.get(f"{of_norm}bias"),
            running_mean=self._weights.get(f"{of_norm}running_mean", mean),
            running_var=self._weights.get(f"{of_norm}running_var", var),
            norm=plan.norm,
            num_groups=plan.groups,
            training=plan.conv_training,
            eps=plan.conv_eps,
            activation=plan.activation,
        )

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return matmul_transposed(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _linear_backward(self, name: str, dy: Tensor) -> Tensor:
        return matmul_transposed(dy, self._weights[f"{name}.weight"].t())

    def norm_out(self, x: Tensor) -> Tensor:
        """Compute the output of a loop from its last residual sum, both ``[M, D]``: the same bits as in :meth:`forward`."""
        return self.kernels.residual_layer_norm.layer_norm(x, *self._norms[4], x.dtype)[0]

    def forward(
        self, x: Tensor, seeds: list[Tensor | None], *, update: bool, attended: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one loop and return (output ``[B, T, D]``, the ``KEPT`` tensors its backward needs beside ``x``).

        Args:
            x: ``[B, T, D]``.
            seeds: of dropout, ``SEEDS`` of them, None for none.
            update: move the running statistics of a training BatchNorm.
            attended: where the output of attention goes, ``[M, D]`` in C, for the backward; None: it is not kept.
        """
        b, t, d = x.shape
        norms = self.kernels.residual_layer_norm
        n, mean, rstd = norms.layer_norm(rows_of(x), *self._norms[0], self._dtype)
        kept = [mean, rstd]
        for r, branch in enumerate(self.plan.branches):
            h = n.view(b * t, d)
            if branch == "attention":
                y, inner = self._attention(h, (b, t), seeds[r], self.plan.inside[r], attended)
            elif branch == "conv":
                y, inner = self._convolution(h, (b, t), update)
            else:
                y, inner = self._feed_forward(branch, h, seeds[r], self.plan.inside[r])
            norm = self._norms[r + 1]
            x, n, mean, rstd = norms.forward(
                ResidualLayerNorm(
                    x, y.view(b, t, d), norm.weight, norm.bias, seeds[4 + r], _ALPHAS[r], self.plan.on[r], norm.eps
                ),
                dtype=x.dtype if r == 3 else self._dtype,
            )
            kept += [*inner, x.view(b * t, d), mean, rstd]
        return n, kept

    def backward(
        self,
        dout: Tensor,
        zeros: Tensor,
        find_x: Callable[[], Tensor],
        kept: list[Tensor],
        attended: Tensor,
        seeds: list[Tensor | None],
        gradients: Gradients,
        batch: int,
    ) -> Tensor:
        """Return the gradient of x ``[M, D]`` from that of the output; hand those of parameters to ``gradients``.

        Args:
            dout: ``[M, D]``.
            zeros: ``[M, D]``.
            find_x: returns x ``[M, D]``; called when nothing else is kept any more.
            kept: what :meth:`forward` returned; emptied, so that each tensor ends with its last use.
            attended: as :meth:`forward` filled it.
        """
        m, d = dout.shape
        shape = (batch, m // batch)
        dn, dx = dout, zeros
        del dout
        dfirst = None  # gradient of what the following branch's first matrix gives
        for r in (3, 2, 1, 0):
            branch, following = self.plan.branches[r], self.plan.branches[r + 1] if r < 3 else None
            s, mean, rstd = kept[-3:]
            inner = kept[-3 - _KEPT[branch] : -3]
            del kept[-3 - _KEPT[branch] :]
            alpha, seed = _ALPHAS[r], seeds[4 + r]
            dy = gradients.rows(_LAST[branch], "dy", s, d, self._dtype)
            if dy is None and not (alpha == 1.0 and seed is None and self._dtype == s.dtype):
                dy = torch.empty_like(s, dtype=self._dtype)
            n = self._first_rows(following, s, gradients)
            dx, dnorm = self.kernels.residual_layer_norm.layer_norm_backward(
                dn,
                dx,
                s,
                mean,
                rstd,
                self._norms[r + 1].weight,
                self._norms[r + 1].bias,
                n=n,
                dy=dy,
                alpha=alpha,
                seed=seed,
                dropout_p=self.plan.on[r],
            )
            self._first_done(r + 1, dnorm, dfirst, n, gradients)
            del s, dn, n, dfirst
            dy = dx if dy is None else dy
            if branch == "attention":
                dn, dfirst = self._attention_backward(
                    dy, inner, attended, shape, seeds[r], self.plan.inside[r], gradients
                )
            elif branch == "conv":
                dn, dfirst = self._convolution_backward(dy, inner, shape, gradients)
            else:
                dn, dfirst = self._feed_forward_backward(branch, dy, inner, seeds[r], self.plan.inside[r], gradients)
            del dy
        mean, rstd = kept
        x, norm = find_x(), self._norms[0]
        n = self._first_rows(self.plan.branches[0], x, gradients)
        dx, dnorm = self.kernels.residual_layer_norm.layer_norm_backward(
            dn, dx, x, mean, rstd, norm.weight, norm.bias, n=n
        )
        self._first_done(0, dnorm, dfirst, n, gradients)
        return dx

    def _first_rows(self, branch: str | None, s: Tensor, gradients: Gradients) -> Tensor | None:
        """Return where the input ``[M, D]`` of a branch's first matrix has to be recomputed; None: it is not needed."""
        if branch is None or not gradients.wants(_FIRST[branch]):
            return None
        rows = gradients.rows(_FIRST[branch], "h", s, s.shape[1], self._dtype)
        return torch.empty_like(s, dtype=self._dtype) if rows is None else rows

    def _first_done(self, r: int, dnorm: Tensor, dfirst: Tensor | None, n: Tensor | None, gradients: Gradients) -> None:
        """Hand over the gradients of norm r and of the first matrix of branch r, now that n_r is recomputed."""
        gradients.add(dnorm, f"{self._norm_names[r]}.weight", f"{self._norm_names[r]}.bias")
        if dfirst is not None and n is not None:
            gradients.product(_FIRST[self.plan.branches[r]], dfirst, n)

    def _feed_forward(self, name: str, h: Tensor, seed: Tensor | None, p: float) -> tuple[Tensor, list[Tensor]]:
        weight, bias = self._weights[f"{name}.up.weight"], self._weights.get(f"{name}.up.bias")
        u, g = self.kernels.feed_forward.up(h, weight, bias, seed, p, self.plan.activation)
        return self._linear(f"{name}.down", g), [u]

    def _feed_forward_backward(self, name, dy, inner, seed, p, gradients) -> tuple[Tensor, Tensor]:
        down, bias = self._weights[f"{name}.down.weight"], self._weights.get(f"{name}.up.bias")
        u, width = inner.pop(), down.shape[1]
        du, g, dbias = self.kernels.feed_forward.up_backward(
            dy,
            down,
            u,
            bias,
            seed,
            p,
            self.plan.activation,
            du=gradients.rows(f"{name}.up", "dy", dy, width, dy.dtype),
            g=gradients.rows(f"{name}.down", "h", dy, width, dy.dtype),
        )
        del u
        gradients.product(f"{name}.down", dy, g)
        del g
        gradients.add(dbias, f"{name}.up.bias")
        return self._linear_backward(f"{name}.up", du), du

    def _heads(self, qkv: Tensor, shape: tuple[int, int], seed: Tensor | None, p: float) -> RelposAttention:
        if isinstance(self.lengths, Packing):
            q, k, v = qkv.view(len(qkv), 3, self.plan.heads, -1).unbind(1)  # each [total, H, D]
            return RelposAttention(q, k, v, *self._positions, None, self.lengths.cu_seqlens, seed, p)
        q, k, v = qkv.view(*shape, 3, self.plan.heads, -1).unbind(2)  # each [B, T, H, D]
        return RelposAttention(q, k, v, *self._positions, self.lengths, None, seed, p)

    def _attention(
        self, h: Tensor, shape: tuple[int, int], seed: Tensor | None, p: float, attended: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        qkv = self._linear("attention.qkv", h)
        heads = self._heads(qkv, shape, seed, p)
        out = None if attended is None else attended.view(heads.q.shape)
        o, lse = self.kernels.relpos_attention.forward(heads, out=out)
        return self._linear("attention.out", o.view(h.shape)), [qkv, lse]

    def _attention_backward(self, dy, inner, attended, shape, seed, p, gradients) -> tuple[Tensor, Tensor]:
        lse, qkv = inner.pop(), inner.pop()
        heads = self._heads(qkv, shape, seed, p)
        o = attended.view(heads.q.shape)
        do = self._linear_backward("attention.out", dy).view(o.shape)
        gradients.product("attention.out", dy, attended)
        dq, dk, dv, *shared = self.kernels.relpos_attention.backward(do, heads, o, lse, partial=True)
        for name, gradient in zip(("pos", "attention.u", "attention.v_bias"), shared):
            gradients.add(gradient, name)
        rows = gradients.rows("attention.qkv", "dy", dy, qkv.shape[1], dy.dtype)
        dqkv = torch.cat([x.reshape(dy.shape) for x in (dq, dk, dv)], 1, out=rows)
        return self._linear_backward("attention.qkv", dqkv), dqkv

    def _convolution(self, h: Tensor, shape: tuple[int, int], update: bool) -> tuple[Tensor, list[Tensor]]:
        p = self._linear("conv.pointwise1", h)
        if update and self._batches is not None:
            self._batches.add_(1)
        c, batch = self.kernels.glu_depthwise_conv.forward(replace(self._conv, x=self._spread(p, shape)), False)
        mean, var = self._running
        if update and mean is not None and var is not None:
            update_running(mean, var, batch.mean, batch.var, batch.frames, self.plan.momentum)
        return self._linear("conv.pointwise2", self._collect(c)), [p]

    def _convolution_backward(self, dy, inner, shape, gradients) -> tuple[Tensor, Tensor]:
        p = inner.pop()
        args = replace(self._conv, x=self._spread(p, shape))
        rows = gradients.rows("conv.pointwise2", "h", dy, dy.shape[1], dy.dtype)
        c, saved = self.kernels.glu_depthwise_conv.forward(args, True, out=self._in_place(rows, shape))
        gradients.product("conv.pointwise2", dy, self._collect(c, rows))
        del c
        dc = self._spread(self._linear_backward("conv.pointwise2", dy), shape)
        rows = gradients.rows("conv.pointwise1", "dy", dy, p.shape[1], dy.dtype)
        dp, dweight, dbias, dnorm = self.kernels.glu_depthwise_conv.backward(
            dc, args, saved, dx=self._in_place(rows, shape), partial=True
        )
        gradients.add(dweight, "conv.depthwise.weight")
        gradients.add(dbias, "conv.depthwise.bias")
        gradients.add(dnorm, "conv.depthwise_norm.bias", "conv.depthwise_norm.weight")
        dp = self._collect(dp, rows)
        return self._linear_backward("conv.pointwise1", dp), dp

    def _spread(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """``[M, C]`` to what the convolution takes: ``[B, T, C]``, or a packed batch as it is laid out."""
        return rows.view(*shape, -1) if self._layout is None else self._layout.spread(rows)

    def _collect(self, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Undo :meth:`_spread`; ``rows`` is where the result belongs, if anywhere."""
        if self._layout is None:
            return y.reshape(-1, y.shape[-1])
        found = self._layout.collect(y)
        return found if rows is None else rows.copy_(found)

    def _in_place(self, rows: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Return ``rows [M, C]`` as the convolution writes it, if it writes just that."""
        return None if rows is None or self._layout is not None else rows.view(*shape, -1)
