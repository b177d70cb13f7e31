"""The inference engine: on a GPU a chain of kernels (:mod:`.chain`), or the modules, as CUDA graphs (:mod:`.graphs`); on a CPU
five kernels a loop on packed weights (:mod:`.weights`).

On the CPU a loop is five kernels in buffers made once per call: rows (feed-forward, norm, projection), attention, rows,
convolution, rows.  The residual stream, norms, scores and sums are float32 whatever the dtype of the stack; the matrices of a
bfloat16 stack are multiplied in bfloat16 where the processor has instructions for it, else in float32.  A frame gets the same
bits in any batch.  The kernels run on threads of their own (csrc/cpu/pool.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lcconformer.config import ConformerConfig
from lcconformer.ops.availability import cpu_reasons
from lcconformer.ops.native import common, cpu_kernels, i64, pointer
from lcconformer.ops.registry import Choice, forced_backend, note
from lcconformer.packing import Packing, padded
from lcconformer.stack import LayerStack

from . import chain, graphs, weights
from .kernels import explain_ops
from .watch import watch
from .weights import FeedForward, PackedLayer, Table, padded_columns

__all__ = ["OP", "Launch", "Loop", "chosen", "convert", "explain", "reasons", "run", "run_layer", "slower"]

OP = "shared_loop"

_IN_BFLOAT16 = "cpu with products of bfloat16"
_NO_BFLOAT16 = "this processor has no AVX512-BF16; the products are in float32"

Launch = Callable[[Any], None]  # a kernel of csrc/cpu


def chosen(stack: LayerStack, x: Tensor, packed: bool) -> list[str]:
    """Return what rules this engine out and was chosen for its own sake: modes of the call, and the encoder's config."""
    found = []
    if watch(stack).trains():
        found.append("a module is in training mode")
    if torch.is_autocast_enabled(x.device.type):
        found.append("autocast is on")
    if x.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            found.append("a CUDA graph is being captured, which the modules become part of")
        if packed:
            found.append("a graph has one shape, and packed batches have any number of frames")
        return found
    if forced_backend() not in ("auto", "cpu"):
        found.append(f"backend {forced_backend()!r} is forced, and the engine is made of CPU kernels")
    if stack.config.position == "rotary":
        found.append("rotary positions are left to the modules")
    return found


def reasons(stack: LayerStack, x: Tensor) -> list[str]:
    """Return what else keeps this engine from the loops of ``x [B, T, d_model]`` and could be changed; empty: nothing."""
    layers = watch(stack)
    found = layers.changed() or layers.unfit(x.dtype)
    return found if x.device.type == "cuda" else found + cpu_reasons(x.device, x.dtype)


# engine on products of float32 against the bfloat16 products of oneDNN, EPYC 9004, d = 256, times as fast: 2.5 at 16 frames,
# 1.09 at 100, 0.82 at 400, 0.76 at 8 x 400
_BFLOAT16_FRAMES = 192


def slower(x: Tensor) -> list[str]:
    """Return why the modules are, or may be, faster for ``x [B, T, d_model]``; empty: they are not."""
    if x.device.type == "cuda" or x.dtype != torch.bfloat16 or x.shape[0] * x.shape[1] <= _BFLOAT16_FRAMES:
        return []
    if torch.cpu._is_amx_tile_supported():
        return [
            "this processor multiplies bfloat16 in tiles (AMX), which the modules' library uses and this engine does not"
        ]
    # both on AVX512-BF16, EPYC 9005 with 2 threads, d = 256, the engine against the modules, times as fast: 3.1 at 100 frames,
    # 1.8 at 200 and 400, 1.3 at 8 x 400, 1.2 at 2 x 1500
    if torch.cpu._is_avx512_bf16_supported() and weights.product_dtype(x) != torch.bfloat16:
        return ["this processor is fast at products of bfloat16, and the modules leave them to its library"]
    return []


def explain(stack: LayerStack, x: Tensor) -> dict[str, Choice]:
    """Return what computes the loops of ``x [B, T, d_model]``, which this engine serves."""
    if x.device.type == "cpu":
        in_float32 = x.dtype == torch.bfloat16 and weights.product_dtype(x) == torch.float32
        return {OP: Choice(OP, "cpu", ((_IN_BFLOAT16, (_NO_BFLOAT16,)),) if in_float32 else ())}
    against = chain.reasons(stack, x, x.shape[0] * graphs.padded_frames(stack, x))
    if not against:
        return {OP: Choice(OP, "triton")}
    return {OP: Choice(OP, "modules", (("triton", tuple(against)),)), **explain_ops(stack, x)}


@torch.no_grad()
def run(
    stack: LayerStack, x: Tensor, lengths: Tensor | Packing | None, depth: int, return_hidden_states: bool
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    if not x.numel():
        return [x.clone() for _ in range(depth if return_hidden_states else 1)]
    if x.device.type == "cuda":
        return graphs.run(stack, x, padded(lengths), depth, return_hidden_states)
    note(Choice(OP, "cpu"))
    layers = weights.packed(stack, depth, x.shape[0] * x.shape[1])
    loop = Loop(stack.config, x, lengths, layers[0].dtype)
    outputs = []
    for k, layer in enumerate(layers):
        if stack.conditioning is not None:
            loop.x.copy_(stack.conditioning.enter(loop.x, k))
        loop.step(layer)
        last = k == depth - 1
        if return_hidden_states or last:
            outputs.append(loop.x if last and x.dtype == torch.float32 else convert(loop.x, x.dtype))
    return outputs


def run_layer(
    config: ConformerConfig, layer: PackedLayer, x: Tensor, lengths: Tensor | None, table: Table | None = None
) -> Tensor:
    """Run one packed layer on the CPU: float32 ``[B, T, d_model] -> [B, T, d_model]``.

    Args:
        table: of relative positions, instead of the layer's own.
    """
    note(Choice(OP, "cpu"))
    loop = Loop(config, x, lengths, layer.dtype, table)
    loop.step(layer)
    return loop.x


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy of ``x``, float32 or bfloat16, in ``dtype``, likewise; made by the threads of the kernels."""
    x = x.contiguous()
    to = torch.empty_like(x, dtype=dtype)
    cpu = cpu_kernels()
    cpu.convert(
        cpu.Convert(**common(x), to_element=common(to)["element"], size=x.numel(), from_=pointer(x), to=pointer(to))
    )
    return to


class Loop:
    """The residual stream of one call, its buffers, and the kernels of each layer with their arguments."""

    def __init__(
        self,
        config: ConformerConfig,
        x: Tensor,
        lengths: Tensor | Packing | None,
        dtype: torch.dtype,
        table: Table | None = None,
    ) -> None:
        self.config, self.table = config, table
        cpu = self.cpu = cpu_kernels()
        b, t, d = x.shape

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu")

        self.x = convert(x, torch.float32)
        self.lengths, self.ends, self.sizes = None, None, {"batch": b, "frames": t}
        if isinstance(lengths, Packing):
            self.ends = i64(lengths.cu_seqlens)
            self.sizes = {"batch": len(lengths.cu_seqlens) - 1, "frames": lengths.longest}
        else:
            self.lengths = i64(lengths)
        # the last tile of rows may reach beyond the last frame
        rows = b * t + cpu.TILE_ROWS
        self.wide = empty(rows, padded_columns(3 * d))  # queries, keys, values; or values and gates
        self.branch = empty(rows, d)  # output of attention or convolution
        if config.conv_norm == "group":
            self.before_norm = empty(b, t, d)
            self.mean, self.var = empty(2, b, config.conv_norm_groups, dtype=torch.float32)
        self.common = common(self.branch)
        self.launches: dict[int, list[tuple[Launch, Any]]] = {}  # of each layer, by its id
        self.panels: list[Tensor | None] = []  # positions that launches hold the address of

    def step(self, layer: PackedLayer) -> None:
        """Run one loop in place."""
        launches = self.launches.get(id(layer))
        if launches is None:
            launches = self.launches[id(layer)] = list(self._launches(layer))
        for kernel, args in launches:
            kernel(args)

    def _launches(self, layer: PackedLayer) -> Iterator[tuple[Launch, Any]]:
        """Yield the kernels of one loop in order, each with its arguments."""
        attention, conv, ffn1, ffn2 = layer.attention, layer.conv, layer.ffn1, layer.ffn2
        middle = [
            (attention.norm, attention.qkv, self._attention, attention.out),
            (conv.norm, conv.pointwise1, self._convolutions, conv.pointwise2),
        ]
        (norm, project, first, merge), (next_norm, next_project, second, next_merge) = (
            reversed(middle) if self.config.convolution_first else middle
        )
        yield self._rows(ffn1, norm=norm.args, next=project.args)
        yield from first(layer)
        yield self._rows(merge=merge.args, norm=next_norm.args, next=next_project.args)
        yield from second(layer)
        yield self._rows(ffn2, merge=next_merge.args, norm=layer.norm.args)

    def _rows(self, ffn: FeedForward | None = None, **parts: Any) -> tuple[Launch, Any]:
        _, _, d = self.x.shape
        if ffn is not None:
            parts |= {"hidden_norm": ffn.norm.args, "up": ffn.up.args, "down": ffn.down.args}
            parts["activation"] = getattr(self.cpu.Activation, self.config.activation)
        args = self.cpu.RowsForward(
            **self.common,
            rows=self.x.shape[0] * self.x.shape[1],
            columns=d,
            x=pointer(self.x),
            branch=pointer(self.branch),
            out=pointer(self.wide),
            out_row_stride=self.wide.stride(0),
            eps=self.config.layer_norm_eps,
            **parts,
        )
        return self.cpu.rows_forward, args

    def _attention(self, layer: PackedLayer) -> Iterator[tuple[Launch, Any]]:
        b, t, d = self.x.shape
        h, pitch, attention = self.config.num_heads, self.wide.stride(0), layer.attention
        panels = layer.position_panels(self.sizes["frames"], self.table)
        self.panels.append(panels)
        strides = {"batch_stride": t * pitch, "frame_stride": pitch, "head_stride": d // h}
        q, k, v = (self.cpu.Heads(data=pointer(self.wide, i * d), **strides) for i in range(3))
        args = self.cpu.RelposAttentionForward(
            **self.common,
            **self.sizes,
            heads=h,
            head_dim=d // h,
            total_frames=b * t,
            q=q,
            k=k,
            v=v,
            u=pointer(attention.u),
            v_bias=pointer(attention.v_bias),
            lengths=pointer(self.lengths),
            cu_seqlens=pointer(self.ends),
            out=pointer(self.branch),
            pos_panels=pointer(panels),
            own_threads=True,
        )
        yield self.cpu.relpos_attention_forward, args

    def _convolutions(self, layer: PackedLayer) -> Iterator[tuple[Launch, Any]]:
        b, t, d = self.x.shape
        x, out = self.wide[: b * t, : 2 * d], self.branch[: b * t]
        if self.ends is None:
            lengths = self.lengths if self.config.padding == "masked" else None
            yield self._convolution(layer, x.unflatten(0, (b, t)), out.view(b, t, d), lengths)
            return
        # utterance by utterance
        for first, end in pairwise(self.ends.tolist()):
            if first < end:
                yield self._convolution(layer, x[None, first:end], out[None, first:end], None)

    def _convolution(self, layer: PackedLayer, x: Tensor, out: Tensor, lengths: Tensor | None) -> tuple[Launch, Any]:
        """Return the kernel from ``x [B, T, 2 d_model]`` to ``out [B, T, d_model]``, contiguous."""
        config, conv, (batch, frames, d) = self.config, layer.conv, out.shape
        norm = conv.depthwise_norm
        statistics = {}
        if config.conv_norm == "group":
            statistics = {"y": pointer(self.before_norm), "mean": pointer(self.mean), "var": pointer(self.var)}
        args = self.cpu.GluDepthwiseConvForward(
            **self.common,
            batch=batch,
            frames=frames,
            channels=d,
            width=config.conv_kernel_size,
            x=pointer(x),
            x_batch_stride=x.stride(0),
            x_frame_stride=x.stride(1),
            taps=pointer(conv.taps),
            bias=pointer(conv.bias),
            lengths=pointer(lengths),
            # a BatchNorm is part of the taps
            norm=getattr(self.cpu.Norm, "none" if norm is None else config.conv_norm),
            groups=config.conv_norm_groups,
            norm_weight=pointer(norm.weight) if norm else 0,
            norm_bias=pointer(norm.bias) if norm else 0,
            eps=config.layer_norm_eps,
            activation=getattr(self.cpu.Activation, config.activation),
            out=pointer(out),
            own_threads=True,
            **statistics,
        )
        return self.cpu.glu_depthwise_conv_forward, args
