"""The inference engine: on a GPU a chain of kernels (:mod:`.chain`), or the modules, as CUDA graphs (:mod:`.graphs`); on a CPU
five kernels a loop on packed weights (:mod:`.weights`).

On the CPU a loop is five kernels in one call into C++: rows (feed-forward, norm, projection), attention, rows, convolution,
rows.  Their buffers are made once per call, or, for few frames, kept for the next call of the same shape.  The residual
stream, norms, softmax and sums are float32 whatever the dtype of the stack; the products of a bfloat16 stack, with its
matrices and in attention, are those of bfloat16 where the processor is faster at them, else of float32.  Weights in 8 bits are
multiplied in 8 bits where the processor can.  A frame gets the same bits in any batch.  The kernels run on threads of their
own (csrc/cpu/pool.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
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
from .watch import Watch
from .weights import FeedForward, PackedLayer, Table, padded_columns

__all__ = ["OP", "Loop", "chosen", "convert", "explain", "reasons", "run", "run_layer", "slower"]

OP = "shared_loop"

_IN_BFLOAT16 = "cpu with products of bfloat16"
_IN_INT8 = "cpu with products of int8"
_NO_INT8 = "this processor has no AVX512-VNNI beside AVX512-BF16; weights are widened when they are packed"

# frames of a batch up to which buffers and arguments are kept, and of how many shapes: making them took 4% of a call of 16
# frames (bfloat16, EPYC 9004, two threads)
_KEPT_FRAMES, _KEPT_SHAPES = 128, 4
# bytes of buffers up to which those of longer calls are kept, whatever the next shape: fresh pages from the system took 3% of
# a call of 400 frames (float32, a Xeon in a virtual machine, two threads)
_KEPT_BYTES = 1 << 25


def chosen(stack: LayerStack, x: Tensor, packed: bool) -> list[str]:
    """Return what rules this engine out and was chosen for its own sake: modes of the call, and the encoder's config."""
    found = []
    if torch.is_autocast_enabled(x.device.type):
        found.append("autocast is on")
    if x.device.type == "cuda":
        if stack.config.weights != "float":
            found.append(f"weights are {stack.config.weights}, which no kernel of the GPU multiplies")
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


def reasons(layers: Watch, x: Tensor) -> list[str]:
    """Return what else keeps this engine from the loops of ``x [B, T, d_model]`` and could be changed; empty: nothing."""
    found = layers.changed() or layers.unfit(x.dtype)
    return found if x.device.type == "cuda" else found + cpu_reasons(x.device, x.dtype)


# engine on products of float32 against the bfloat16 products of oneDNN, EPYC 9004, d = 256, times as fast: 2.5 at 16 frames,
# 1.09 at 100, 0.82 at 400, 0.76 at 8 x 400
_BFLOAT16_FRAMES = 192


def slower(stack: LayerStack, x: Tensor) -> list[str]:
    """Return why the modules are, or may be, faster for ``x [B, T, d_model]``; empty: they are not."""
    if stack.config.weights != "float":
        return []  # the modules widen them at every call
    if x.device.type == "cuda" or x.dtype != torch.bfloat16 or x.shape[0] * x.shape[1] <= _BFLOAT16_FRAMES:
        return []
    if torch.cpu._is_amx_tile_supported():
        return [
            "this processor multiplies bfloat16 in tiles (AMX), which the modules' library uses and this engine does not"
        ]
    # both on AVX512-BF16, EPYC 9005 with 2 threads, d = 256, the engine against the modules, times as fast: 3.1 at 100 frames,
    # 1.8 at 200 and 400, 1.3 at 8 x 400, 1.2 at 2 x 1500
    by_library = torch.cpu._is_avx512_bf16_supported() and cpu_kernels().bfloat16_gain() > 1
    if by_library and weights.product_dtype(x) != torch.bfloat16:
        return ["this processor is fast at products of bfloat16, and the modules leave them to its library"]
    return []


def explain(stack: LayerStack, x: Tensor) -> dict[str, Choice]:
    """Return what computes the loops of ``x [B, T, d_model]``, which this engine serves."""
    if x.device.type == "cpu":
        if stack.config.weights == "int8" and not weights.multiplies_int8():
            return {OP: Choice(OP, "cpu", ((_IN_INT8, (_NO_INT8,)),))}
        slow = None
        if x.dtype == torch.bfloat16 and stack.config.weights == "float":
            slow = weights.against_bfloat16(x.shape[-1])
        return {OP: Choice(OP, "cpu", ((_IN_BFLOAT16, (f"{slow}; they are in float32",)),) if slow else ())}
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
    if torch.get_num_threads() > 1:
        # they wake up while the weights are compared
        cpu_kernels().wake_helpers()
    layers = weights.packed(stack, depth, x.shape[0] * x.shape[1])
    kept, key = layers[0].kept, _key(x, lengths)
    loop = None if key is None else kept.pop(key, None)
    if loop is None:
        # buffers that are kept must be writable in calls that are not in inference mode, too
        with torch.inference_mode(torch.is_inference_mode_enabled() and key is None):
            loop = Loop(stack.config, x, lengths, layers[0].dtype, memory=_taken(layers[0]) if key is None else None)
    loop.enter(x, lengths)
    outputs = []
    for k, layer in enumerate(layers):
        if stack.conditioning is not None:
            loop.x.copy_(stack.conditioning.enter(loop.x, k))
        loop.step(layer)
        last = k == depth - 1
        if return_hidden_states or last:
            own = last and x.dtype == torch.float32 and key is None
            outputs.append(loop.x if own else convert(loop.x, x.dtype))
    if key is not None:
        if len(kept) >= _KEPT_SHAPES:
            kept.clear()
        kept[key] = loop
    elif loop.memory.nbytes <= _KEPT_BYTES:
        layers[0].memory[:] = [loop.memory]
    return outputs


def _taken(layer: PackedLayer) -> Tensor | None:
    """Return the buffers that a call has left and make them those of this call alone."""
    try:
        return layer.memory.pop()
    except IndexError:
        return None


def _key(x: Tensor, lengths: Tensor | Packing | None) -> tuple | None:
    """Return what buffers and arguments depend on beside the packed weights; None: they are not kept."""
    if isinstance(lengths, Packing) or x.shape[0] * x.shape[1] > _KEPT_FRAMES:
        return None
    return (*x.shape, lengths is None, torch.get_num_threads(), cpu_kernels().simd_level())


def run_layer(
    config: ConformerConfig, layer: PackedLayer, x: Tensor, lengths: Tensor | None, table: Table | None = None
) -> Tensor:
    """Run one packed layer on the CPU: float32 ``[B, T, d_model] -> [B, T, d_model]``.

    Args:
        table: of relative positions, instead of the layer's own.
    """
    note(Choice(OP, "cpu"))
    loop = Loop(config, x, lengths, layer.dtype, table)
    loop.enter(x, lengths)
    loop.step(layer)
    return loop.x


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy of ``x``, float32 or bfloat16, in ``dtype``, likewise; made by the threads of the kernels."""
    x = x.contiguous()
    to = torch.empty_like(x, dtype=dtype)
    _copy(x, to)
    return to


def _copy(x: Tensor, to: Tensor) -> None:
    """Write ``x`` to ``to``, both contiguous."""
    cpu = cpu_kernels()
    cpu.convert(
        cpu.Convert(**common(x), to_element=common(to)["element"], size=x.numel(), from_=pointer(x), to=pointer(to))
    )


class Loop:
    """The residual stream of a call, its buffers, and the kernels of each layer with their arguments.

    :meth:`enter` starts a call; the inputs of all calls have one shape, and lengths or none.

    Args:
        memory: buffers of another call that has ended, of ``dtype``; used if they are large enough.
    """

    def __init__(
        self,
        config: ConformerConfig,
        x: Tensor,
        lengths: Tensor | Packing | None,
        dtype: torch.dtype,
        table: Table | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self.config, self.table = config, table
        cpu = self.cpu = cpu_kernels()
        b, t, d = x.shape

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu")

        self.x = empty(b, t, d, dtype=torch.float32)
        self.ends, self.sizes = None, {"batch": b, "frames": t}
        self.lengths = empty(b, dtype=torch.int64) if isinstance(lengths, Tensor) else None
        if isinstance(lengths, Packing):
            self.ends = i64(lengths.cu_seqlens)
            self.sizes = {"batch": len(lengths.cu_seqlens) - 1, "frames": lengths.longest}
        # the last tile of rows may reach beyond the last frame
        rows = b * t + cpu.TILE_ROWS
        # queries, keys, values, or values and gates; and the output of attention or convolution
        sizes = (rows * padded_columns(3 * d), rows * d)
        if memory is None or memory.numel() < sum(sizes):
            with torch.inference_mode(False):
                memory = empty(sum(sizes))
        self.memory = memory
        self.wide, self.branch = (part.view(rows, -1) for part in memory[: sum(sizes)].split(sizes))
        if config.conv_norm == "group":
            self.before_norm = empty(b, t, d)
            self.mean, self.var = empty(2, b, config.conv_norm_groups, dtype=torch.float32)
        self.common = common(self.branch)
        self.steps: dict[int, list[Callable[[], None]]] = {}  # of each layer, by its id
        self.panels: list[Tensor | None] = []  # positions that steps hold the address of

    def enter(self, x: Tensor, lengths: Tensor | Packing | None) -> None:
        """Take the input ``x [B, T, d_model]`` and the lengths of a call."""
        _copy(x.contiguous(), self.x)
        if self.lengths is not None and isinstance(lengths, Tensor):
            self.lengths.copy_(lengths)

    def step(self, layer: PackedLayer) -> None:
        """Run one loop in place."""
        steps = self.steps.get(id(layer))
        if steps is None:
            steps = self.steps[id(layer)] = list(self._steps(layer))
        for run in steps:
            run()

    def _steps(self, layer: PackedLayer) -> Iterator[Callable[[], None]]:
        """Yield what makes one loop: kernels that follow one another are one call."""
        for by_python, parts in groupby(self._parts(layer), callable):
            if by_python:
                yield from parts
                continue
            sequence = self.cpu.Sequence()
            for args in parts:
                sequence.append(args)
            yield sequence.run

    def _parts(self, layer: PackedLayer) -> Iterator[Any]:
        """Yield the parts of one loop in order: arguments of a kernel, or a function that takes none."""
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

    def _rows(self, ffn: FeedForward | None = None, **parts: Any) -> Any:
        _, _, d = self.x.shape
        if ffn is not None:
            parts |= {"hidden_norm": ffn.norm.args, "up": ffn.up.args, "down": ffn.down.args}
            parts["activation"] = getattr(self.cpu.Activation, self.config.activation)
        return self.cpu.RowsForward(
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

    def _attention(self, layer: PackedLayer) -> Iterator[Any]:
        b, t, d = self.x.shape
        h, pitch, attention = self.config.num_heads, self.wide.stride(0), layer.attention
        panels = layer.position_panels(self.sizes["frames"], self.table)
        self.panels.append(panels)
        strides = {"batch_stride": t * pitch, "frame_stride": pitch, "head_stride": d // h}
        q, k, v = (self.cpu.Heads(data=pointer(self.wide, i * d), **strides) for i in range(3))
        yield self.cpu.RelposAttentionForward(
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
            products=self.common["element"],
            own_threads=True,
        )

    def _convolutions(self, layer: PackedLayer) -> Iterator[Any]:
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

    def _convolution(self, layer: PackedLayer, x: Tensor, out: Tensor, lengths: Tensor | None) -> Any:
        """Return the arguments of the kernel from ``x [B, T, 2 d_model]`` to ``out [B, T, d_model]``, contiguous."""
        config, conv, (batch, frames, d) = self.config, layer.conv, out.shape
        norm = conv.depthwise_norm
        statistics = {}
        if config.conv_norm == "group":
            statistics = {"y": pointer(self.before_norm), "mean": pointer(self.mean), "var": pointer(self.var)}
        return self.cpu.GluDepthwiseConvForward(
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
