"""Inference on a GPU as a chain of ten Triton kernels a loop, all loops in one recording.

    LN, up, SiLU | down, residual | LN, queries keys values | attention | out, residual
    LN, pointwise, GLU | depthwise, norm, SiLU | pointwise, residual | LN, up, SiLU | down, residual

The LayerNorm that ends a loop is done by the first kernel of the next one, and by a kernel of its own after the last.  One
more launch a layer makes its depthwise taps ready, and one product its positions, in every call: all weights are read where
they are, so that an update in place needs no new recording and no comparison.

Launches are bound to their arguments once for all loops of a layer and for all calls, as buffers and weights stay where they
are: without a CUDA graph a call is a walk over a list.  The list belongs to the recording, which is dropped when a weight has
moved (:mod:`.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lcconformer.layer import ConformerLayer, FeedForward
from lcconformer.ops.availability import triton_reasons
from lcconformer.ops.registry import forced_backend
from lcconformer.ops.relpos_attention.arguments import MAX_HEAD_DIM
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from .recording import Record, Replay
from .watch import watch

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
    if not all(t.is_contiguous() for t in watch(stack).tensors()):
        # a kernel takes a vector as contiguous: a copy would be bound in its place, and be out of date after an update
        found.append("weights that are not contiguous are left to the modules")
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
        heads = (config.num_heads, d // config.num_heads)
        self.lse = x.new_empty((heads[0], b * t), dtype=torch.float32)
        self.table = x.new_zeros((2 * t - 1, *heads))  # no positions
        self.no_bias = x.new_zeros(heads)
        if config.position == "relative":
            self.table = relative_sinusoids(t, d, device=x.device, dtype=x.dtype)
        self._own: dict[tuple[Any, ...], Tensor] = {}  # buffers of a layer
        self._calls: dict[tuple[int, bool], Replay] = {}

    def run(self, stack: LayerStack, depth: int, all_states: bool) -> Iterator[Tensor]:
        """Yield the outputs ``[B, T, d_model]`` of loops 0 ... ``depth - 1``, or of the last alone.

        The next call overwrites them.
        """
        if all_states and self.states is None:
            self.states = self.x.new_empty((self.config.num_layers, *self.x.shape))
        if (depth, all_states) not in self._calls:
            self._calls[depth, all_states] = self._record(self._bind(stack, depth, all_states))
        self._calls[depth, all_states]()
        outputs = self.states[:depth] if all_states and self.states is not None else self.entered[None]
        yield from outputs.view(-1, *self.shape)

    def _bind(self, stack: LayerStack, depth: int, all_states: bool) -> Callable[[], None]:
        """Return what runs ``depth`` loops: launches with all arguments, most of them the same in all loops of a layer."""
        from lcconformer.kernels.common import Launch, collected, run

        states = list(self.states) if all_states and self.states is not None else [self.entered] * depth
        keys = [(i, k if self.config.conv_norm_statistics == "per_depth" else 0) for k, i in enumerate(stack.layer_map)]
        taps: dict[tuple[int, int], Tensor] = {}
        projections: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> weight, pos
        # all that does not wait for the kernel before it, ahead of those that do
        with collected() as launches:
            for k, key in enumerate(keys[:depth]):
                if key not in taps:
                    taps[key] = self._taps(key, stack.layer_of(k), stack.overrides(k))
        if self.config.position == "relative":
            for k, i in enumerate(stack.layer_map[:depth]):
                pos = self._buffer("pos", i, shape=self.table.shape)
                projections[i] = stack.layer_of(k).attention.pos.weight.detach().t(), pos

        bound: dict[tuple[Any, ...], list[Launch]] = {}

        def launch(key: tuple[Any, ...], make: Callable[..., None], *args: Any) -> None:
            if key not in bound:
                with collected() as bound[key]:
                    make(*args)
            launches.extend(bound[key])

        previous, norm = -1, None  # the loop before: its layer, and the norm that ends it
        for k, (i, _) in enumerate(keys[:depth]):
            layer = stack.layer_of(k)
            launch(("begin", i, previous, k if all_states else 0), self._begin, layer, norm, states[k - 1])
            launch(("go on", *keys[k]), self._go_on, layer, taps[keys[k]], projections[i][1] if projections else None)
            previous, norm = i, layer.norm
        launch(("end",), self._end, norm, states[depth - 1])

        x, table = self.x, self.table  # not the chain, whose recording this is

        def call() -> None:
            for weight, pos in projections.values():
                torch.mm(table, weight, out=pos)
            run(launches, x)

        return call

    def _buffer(self, *key: Any, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer by its name: recordings share it, and a graph does not keep it itself."""
        if key not in self._own:
            self._own[key] = self.x.new_empty(shape, dtype=dtype)
        return self._own[key]

    def _taps(self, key: tuple[int, int], layer: ConformerLayer, overrides: dict[str, Tensor]) -> Tensor:
        from lcconformer.kernels import chain_convolution as convolution

        depthwise, norm = layer.conv.depthwise, layer.conv.depthwise_norm
        batch_norm = None
        if isinstance(norm, torch.nn.BatchNorm1d):
            name = "conv.depthwise_norm.running_"
            statistics = (overrides.get(name + s, getattr(norm, f"running_{s}")) for s in ("mean", "var"))
            batch_norm = (norm.weight, norm.bias, *statistics)
        rows = convolution.tap_rows(self.config.conv_kernel_size)
        taps = self._buffer("taps", *key, shape=(rows, self.x.shape[1]), dtype=torch.float32)
        convolution.taps(depthwise.weight, depthwise.bias, batch_norm, self.config.layer_norm_eps, taps)
        return taps

    def _begin(self, layer: ConformerLayer, previous: Any, entered: Tensor) -> None:
        """Run the first half step of a loop, from ``x`` or, after a ``previous`` norm, from ``stream``; leaves ``stream``."""
        if previous is None:
            self._feed_forward(layer.ffn1, self.x, self.x, pdl=False)
        else:
            ahead = {"previous": (previous.weight, previous.bias), "entered": entered}
            self._feed_forward(layer.ffn1, self.stream, entered, **ahead)

    def _go_on(self, layer: ConformerLayer, taps: Tensor, pos: Tensor | None) -> None:
        """Run what is between the first half step of a loop and its last norm, in ``stream``."""
        if layer.convolution_first:
            self._convolution(layer, taps)
            self._attention(layer, pos)
        else:
            self._attention(layer, pos)
            self._convolution(layer, taps)
        self._feed_forward(layer.ffn2, self.stream, self.stream)

    def _end(self, norm: Any, out: Tensor) -> None:
        from lcconformer.kernels import chain_products as products

        products.norm(self.stream, norm.weight, norm.bias, out, self.config.layer_norm_eps)

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

    def _attention(self, layer: ConformerLayer, pos: Tensor | None) -> None:
        """Attend with positions ``pos [2T-1, d_model]``, or with none."""
        from lcconformer.kernels import relpos_attention

        module, (b, t, d) = layer.attention, self.shape
        positions = (self.table, self.no_bias, self.no_bias)
        if pos is not None:
            positions = (pos.view(-1, *module.u.shape), module.u, module.v_bias)
        self._up(module.norm, module.qkv, self.stream, self.qkv)
        q, k, v = self.qkv.view(b, t, 3, module.heads, d // module.heads).unbind(2)
        out = self.branch.view(q.shape)
        relpos_attention.forward(q, k, v, *positions, self.lengths, None, None, 0.0, out, self.lse)
        self._down(module.out, self.branch, self.stream)

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
