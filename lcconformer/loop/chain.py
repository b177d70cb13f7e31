"""Inference on a GPU as a chain of ten Triton kernels a loop, all loops in one recording.

    LN, up, SiLU | down, residual | LN, queries keys values | attention | out, residual
    LN, pointwise, GLU | depthwise, norm, SiLU | pointwise, residual | LN, up, SiLU | down, residual

The LayerNorm that ends a loop is done by the first kernel of the next one, and by a kernel of its own after the last.  One
more launch a layer makes its depthwise taps ready, and one product its positions, in every call: all weights are read where
they are, so that an update in place needs no new recording and no comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer.layer import ConformerLayer, FeedForward
from lcconformer.ops.availability import triton_reasons
from lcconformer.ops.registry import forced_backend
from lcconformer.ops.relpos_attention.arguments import MAX_HEAD_DIM
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from .recording import Record, Replay

__all__ = ["Chain", "reasons"]

# d_model up to which -> rows up to which the chain is predicted to be no slower than the recorded modules, whose products are
# the library's.  Predicted for an H200 in bfloat16 (bench/reports/predicted.py), 12 loops, chain and modules in ms:
# d_model 256: 0.475 and 0.715 at 128 rows, 0.834 and 0.843 at 2048, 0.979 and 0.948 at 2560;
# 512: 0.641 and 0.824 at 128, 0.747 and 0.860 at 256, 0.997 and 0.897 at 384;
# 768: 0.912 and 0.910 at 64, 1.333 and 0.975 at 128.
MOST_ROWS = {256: 2048, 512: 256, 768: 64}


def reasons(stack: LayerStack, x: Tensor, rows: int) -> list[str]:
    """Return why the chain cannot serve inputs like ``x [..., d_model]`` and layers whose weights may be read; empty: it can.

    Args:
        rows: frames in all, with those that are added to fill a bucket.
    """
    found = triton_reasons(x.device, x.dtype)
    want = forced_backend()
    if want not in ("auto", "triton") or (want == "auto" and x.device.type != "cuda"):
        found.append(f"backend {want!r}" + (" takes no Triton on a CPU" if want == "auto" else " is forced"))
    if found:
        return found
    from lcconformer.kernels import chain_products as products
    from lcconformer.kernels.common import arch_of

    config, d = stack.config, x.shape[-1]
    if config.activation != "silu":
        found.append(f"activation {config.activation!r} is not fused, only 'silu' is")
    if config.position == "rotary":
        found.append("rotary positions are left to the modules")
    if config.conv_norm == "group":
        found.append("conv_norm='group' is left to the modules")
    if config.conditioning:
        found.append("conditioning is left to the modules")
    if d // config.num_heads > MAX_HEAD_DIM:
        found.append(f"heads are fused up to D = {MAX_HEAD_DIM}, got D = {d // config.num_heads}")
    widest = products.max_width(arch_of(x), rows)
    if d > widest:
        found.append(f"{rows} rows are fused up to d_model = {widest} on this GPU, got {d}")
    if rows > products.FEW and x.dtype == torch.float32:
        found.append(f"products of more than {products.FEW} float32 rows are left to the library")
    most = next((rows for width, rows in MOST_ROWS.items() if d <= width), 0)
    if rows > most:
        found.append(
            f"{rows} rows are left to the library's products, predicted to be faster beyond {most} at this width"
        )
    return found


class Chain:
    """The buffers of one shape, and its recordings: one for each depth, and whether all loops' outputs are wanted.

    Args:
        x: static input ``[B, T, d_model]``, contiguous; it is only read.
        lengths: static ``[B]``, or None.
        record: what records and replays.
    """

    def __init__(self, stack: LayerStack, x: Tensor, lengths: Tensor | None, record: Record) -> None:
        config = self.config = stack.config
        b, t, d = x.shape
        self.shape, self.x, self.lengths, self._record = (b, t, d), x.view(b * t, d), lengths, record

        def empty(*columns: int) -> Tensor:
            return x.new_empty((b * t, *columns))

        self.stream, self.entered = empty(d), empty(d)  # the residual stream in a loop, and as the loop begins
        self.hidden, self.qkv, self.gated, self.branch = empty(config.ffn_dim), empty(3 * d), empty(d), empty(d)
        self.states: Tensor | None = None  # [N, B T, d_model], where all loops' outputs are wanted
        heads = config.num_heads
        self.table = x.new_zeros((2 * t - 1, heads, d // heads))  # no positions
        self.no_bias = x.new_zeros((heads, d // heads))
        if config.position == "relative":
            self.table = relative_sinusoids(t, d, device=x.device, dtype=x.dtype)
        self._calls: dict[tuple[int, bool], Replay] = {}

    def run(self, stack: LayerStack, depth: int, all_states: bool) -> Iterator[Tensor]:
        """Yield the outputs ``[B, T, d_model]`` of loops 0 ... ``depth - 1``, or of the last alone.

        The next call overwrites them.
        """
        if all_states and self.states is None:
            self.states = self.x.new_empty((self.config.num_layers, *self.x.shape))
        if (depth, all_states) not in self._calls:
            self._calls[depth, all_states] = self._record(lambda: self._call(stack, depth, all_states))
        self._calls[depth, all_states]()
        outputs = self.states[:depth] if all_states and self.states is not None else self.entered[None]
        yield from outputs.view(-1, *self.shape)

    def _call(self, stack: LayerStack, depth: int, all_states: bool) -> None:
        from lcconformer.kernels import chain_products as products

        states = list(self.states) if all_states and self.states is not None else [self.entered] * depth
        taps: dict[tuple[int, int], Tensor] = {}
        positions: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        keys = [(i, k if self.config.conv_norm_statistics == "per_depth" else 0) for k, i in enumerate(stack.layer_map)]
        # all that does not wait for the kernel before it, ahead of those that do
        for k in range(depth):
            if keys[k] not in taps:
                taps[keys[k]] = self._taps(stack.layer_of(k), stack.overrides(k))
            if keys[k][0] not in positions:
                positions[keys[k][0]] = self._positions(stack.layer_of(k))
        for k in range(depth):
            previous = stack.layer_of(k - 1).norm if k else None
            self._loop(stack.layer_of(k), taps[keys[k]], positions[keys[k][0]], previous, states[k - 1])
        norm = stack.layer_of(depth - 1).norm
        products.norm(self.stream, norm.weight, norm.bias, states[depth - 1], self.config.layer_norm_eps)

    def _taps(self, layer: ConformerLayer, overrides: dict[str, Tensor]) -> Tensor:
        from lcconformer.kernels import chain_convolution as convolution

        depthwise, norm = layer.conv.depthwise, layer.conv.depthwise_norm
        batch_norm = None
        if isinstance(norm, torch.nn.BatchNorm1d):
            name = "conv.depthwise_norm.running_"
            statistics = (overrides.get(name + s, getattr(norm, f"running_{s}")) for s in ("mean", "var"))
            batch_norm = (norm.weight, norm.bias, *statistics)
        rows = convolution.tap_rows(self.config.conv_kernel_size)
        taps = self.x.new_empty((rows, self.x.shape[1]), dtype=torch.float32)
        convolution.taps(depthwise.weight, depthwise.bias, batch_norm, self.config.layer_norm_eps, taps)
        return taps

    def _positions(self, layer: ConformerLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Return pos ``[2T-1, H, D]``, u and v_bias ``[H, D]``."""
        attention = layer.attention
        if self.config.position != "relative":
            return self.table, self.no_bias, self.no_bias
        pos = F.linear(self.table, attention.pos.weight).view(-1, *attention.u.shape)
        return pos, attention.u, attention.v_bias

    def _loop(
        self,
        layer: ConformerLayer,
        taps: Tensor,
        positions: tuple[Tensor, Tensor, Tensor],
        previous: Any,
        entered: Tensor,
    ) -> None:
        """Run one loop up to its last norm, from ``x`` or, after a ``previous`` norm, from ``stream``; leaves ``stream``."""
        if previous is None:
            self._feed_forward(layer.ffn1, self.x, self.x, pdl=False)
        else:
            ahead = {"previous": (previous.weight, previous.bias), "entered": entered}
            self._feed_forward(layer.ffn1, self.stream, entered, **ahead)
        if layer.convolution_first:
            self._convolution(layer, taps)
            self._attention(layer, positions)
        else:
            self._attention(layer, positions)
            self._convolution(layer, taps)
        self._feed_forward(layer.ffn2, self.stream, self.stream)

    def _up(self, norm: Any, linear: Any, source: Tensor, out: Tensor, **options: Any) -> None:
        from lcconformer.kernels import chain_products as products

        eps = self.config.layer_norm_eps
        products.norm_product(source, (norm.weight, norm.bias), linear.weight, linear.bias, out, eps, **options)

    def _down(self, linear: Any, source: Tensor, residual: Tensor, scale: float = 1.0) -> None:
        from lcconformer.kernels import chain_products as products

        products.residual_product(source, linear.weight, linear.bias, residual, self.stream, scale)

    def _feed_forward(self, module: FeedForward, source: Tensor, residual: Tensor, **options: Any) -> None:
        self._up(module.norm, module.up, source, self.hidden, epilogue="silu", **options)
        self._down(module.down, self.hidden, residual, 0.5)

    def _attention(self, layer: ConformerLayer, positions: tuple[Tensor, Tensor, Tensor]) -> None:
        from lcconformer.kernels import relpos_attention

        module, (b, t, d) = layer.attention, self.shape
        self._up(module.norm, module.qkv, self.stream, self.qkv)
        q, k, v = self.qkv.view(b, t, 3, module.heads, d // module.heads).unbind(2)
        out, _ = relpos_attention.forward(q, k, v, *positions, self.lengths, None, None, 0.0)
        self._down(module.out, out.view(b * t, d), self.stream)

    def _convolution(self, layer: ConformerLayer, taps: Tensor) -> None:
        from lcconformer.kernels import chain_convolution as convolution

        module, config = layer.conv, self.config
        self._up(module.norm, module.pointwise1, self.stream, self.gated, epilogue="glu")
        norm: Any = module.depthwise_norm
        convolution.depthwise(
            self.gated.view(self.shape),
            taps,
            config.conv_kernel_size,
            self.lengths if config.padding == "masked" else None,
            (norm.weight, norm.bias) if config.conv_norm == "layer" else None,
            config.layer_norm_eps,
            self.branch.view(self.shape),
        )
        self._down(module.pointwise2, self.branch, self.stream)
