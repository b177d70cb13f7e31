"""Packed weights: what inference needs of each unique layer, computed once for all loops and all calls.

A layer's matrices become panels for csrc/cpu/simd/rows.cpp in float32; the half steps are folded into the second
projection of the feed-forwards, an evaluated BatchNorm into the depthwise taps, and position embeddings are projected once.

Packed weights belong to an encoder but are no part of it: they are kept beside it, by weak reference, so that they are not
saved, moved, copied or pickled with it and end with it.  At every call (:mod:`.watch`) each parameter and buffer is compared
with what was packed: which memory, which layout, autograd's version counter, and whether an optimizer stepped.  Other
writes that the counter does not see (through ``p.data`` or ``p.numpy()``) are noticed by a fingerprint: of all values where
the call is long enough to hide it, else of up to 64 values spread over each tensor, one of which any average or
initialisation changes; after such a write to a few elements alone, ahead of short calls, call
:meth:`ConformerEncoder.forget_packed_weights <lcconformer.ConformerEncoder.forget_packed_weights>`.  Tensors of
``torch.inference_mode`` have no counter, and those in shared memory can be written by another process: with such tensors the
weights are packed at every call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcconformer.config import ConformerConfig
from lcconformer.layer import RelativeAttention
from lcconformer.ops.native import common, cpu_kernels, pointer
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from .watch import Watch, watch

__all__ = [
    "COMPLETE",
    "Affine",
    "FeedForward",
    "Fingerprint",
    "Matrix",
    "PackedLayer",
    "Table",
    "cacheable",
    "forget",
    "pack",
    "packed",
    "padded_columns",
    "project",
]


def padded_columns(columns: int) -> int:
    """Return ``columns`` rounded up to whole panels, for a matrix and its product."""
    return columns + -columns % cpu_kernels().PANEL_COLUMNS


@dataclass(frozen=True)
class Matrix:
    """``y = x W + bias``: panels of W ``[columns / PANEL_COLUMNS rounded up, inputs, PANEL_COLUMNS]``, bias; zeros beyond.

    Panels in bfloat16 are ``[..., inputs / 2 rounded up, PANEL_COLUMNS, 2]``: neighbours are multiplied and added at once.
    """

    panels: Tensor
    bias: Tensor
    inputs: int
    columns: int
    # of weights in 8 bits: the scale of each column, and what its sums start at
    scales: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of_int8(
        cls, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: float = 1.0, *, group: int | None = None
    ) -> Matrix:
        """Pack the weights of a :class:`~lcconformer.quantization.QuantizedLinear`, ``[columns, inputs]``.

        Panels are int8 ``[..., inputs / 4 rounded up, PANEL_COLUMNS, 4]``.  ``group`` inputs, or all, have one scale in a row.
        """
        columns, inputs = weight.shape
        panel, beyond = cpu_kernels().PANEL_COLUMNS, padded_columns(columns) - columns
        panels = F.pad(weight, (0, -inputs % 4, 0, beyond)).unflatten(0, (-1, panel))  # [panels, panel, inputs]
        bias = weight_scale.new_zeros(columns) if bias is None else bias.float() * scale
        return cls(
            panels.unflatten(2, (-1, 4)).transpose(1, 2).contiguous(),
            F.pad(bias, (0, beyond)),
            inputs,
            columns,
            F.pad(weight_scale.float() * scale, (0, beyond)),
            # the kernel's inputs are 128 too large, so that no byte is negative: [groups, columns]
            torch.stack(
                [F.pad(-128 * w.sum(1, dtype=torch.int32), (0, beyond)) for w in weight.split(group or inputs, 1)]
            ),
        )

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Matrix:
        """Pack the weights of an ``nn.Linear``: weight ``[columns, inputs]``, bias ``[columns]`` or None."""
        columns, inputs = weight.shape
        panel, beyond = cpu_kernels().PANEL_COLUMNS, padded_columns(columns) - columns
        weight = F.pad(weight.float() * scale, (0, 0, 0, beyond))
        bias = weight.new_zeros(columns) if bias is None else bias.float() * scale
        panels = weight.unflatten(0, (-1, panel)).mT  # [panels, inputs, panel]
        if dtype == torch.bfloat16:
            panels = F.pad(panels, (0, 0, 0, inputs % 2)).unflatten(1, (-1, 2)).mT
        return cls(panels.to(dtype).contiguous(), F.pad(bias, (0, beyond)), inputs, columns)

    @functools.cached_property
    def args(self) -> Any:
        """``cpu.Matrix``, what the kernels take."""
        return cpu_kernels().Matrix(
            panels=pointer(self.panels),
            bias=pointer(self.bias),
            inputs=self.inputs,
            columns=self.columns,
            scales=pointer(self.scales),
            starts=pointer(self.starts),
        )


@dataclass(frozen=True)
class Affine:
    """Scale and shift of a norm, ``[d_model]``."""

    weight: Tensor
    bias: Tensor

    @functools.cached_property
    def args(self) -> Any:
        """``cpu.Affine``, what the kernels take."""
        return cpu_kernels().Affine(weight=pointer(self.weight), bias=pointer(self.bias))


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward, its half step folded into ``down``."""

    norm: Affine
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Attention:
    """An attention module; ``pos``, ``u`` and ``v_bias`` ``[H, D]`` only with relative positions."""

    norm: Affine
    qkv: Matrix
    out: Matrix
    pos: Matrix | None
    u: Tensor | None
    v_bias: Tensor | None


@dataclass(frozen=True)
class Convolution:
    """A convolution module with taps ``[K, C]``; a BatchNorm is folded into taps and bias."""

    norm: Affine
    pointwise1: Matrix
    taps: Tensor
    bias: Tensor
    depthwise_norm: Affine | None
    pointwise2: Matrix


@dataclass
class PackedLayer:
    """The packed weights of one unique layer: matrices in ``dtype``, the rest in float32."""

    ffn1: FeedForward
    attention: Attention
    conv: Convolution
    ffn2: FeedForward
    norm: Affine
    heads: int
    dtype: torch.dtype
    # what calls of few frames work in, kept by the engine for their next: inference.Loop by shape
    kept: dict[tuple, Any] = field(default_factory=dict, repr=False)
    # the buffers of the last longer call, for the next, if no call has them
    memory: list[Tensor] = field(default_factory=list, repr=False)
    # grow-only: rows of positions Tmax-1 ... -(Tmax-1), [2 Tmax - 1, d_model padded]
    _positions: Tensor | None = field(default=None, repr=False)
    # of the latest T: (T, SIMD level, table, panels of each head)
    _panels: tuple[int, str, Table | None, Tensor] | None = field(default=None, repr=False)

    def positions(self, frames: int) -> Tensor:
        """Projected relative positions frames-1 ... -(frames-1), ``[2 frames - 1, d_model padded]``."""
        assert self.attention.pos is not None
        rows = self._positions
        if rows is None or rows.shape[0] < 2 * frames - 1:
            width = self.attention.pos.inputs
            table = relative_sinusoids(frames, width, device=torch.device("cpu"), dtype=torch.float32)
            rows = self._positions = project(self.attention.pos, table)
        last = (rows.shape[0] + 1) // 2 + frames - 1
        return rows[last - (2 * frames - 1) : last]

    def position_panels(self, frames: int, table: Table | None = None) -> Tensor | None:
        """Projected relative positions of ``frames`` frames as the attention kernel takes them; None without positions.

        Args:
            table: makes those of ``frames`` frames of this layer instead, ``[2 frames - 1, d_model]``.
        """
        if self.attention.pos is None and table is None:
            return None
        cpu = cpu_kernels()
        level, kept = cpu.simd_level(), self._panels
        if kept is not None and kept[:3] == (frames, level, table):
            return kept[3]
        rows = self.positions(frames) if table is None else table(self, frames)
        width = self.attention.qkv.inputs // self.heads
        products = common(rows.new_empty(0, dtype=self.dtype))["element"]
        size = self.heads * cpu.relpos_attention_position_size(products, frames, width)
        panels = rows.new_empty(size, dtype=self.dtype)
        args = cpu.RelposAttentionPackPositions(
            **common(rows),
            frames=frames,
            heads=self.heads,
            head_dim=width,
            pos=pointer(rows),
            pos_frame_stride=rows.stride(0),
            pos_head_stride=width,
            pos_panels=pointer(panels),
            products=products,
        )
        cpu.relpos_attention_pack_positions(args)
        self._panels = (frames, level, table, panels)
        return panels


Table = Callable[[PackedLayer, int], Tensor]


def project(pos: Matrix, table: Tensor) -> Tensor:
    """Project ``[rows, d_model]`` by our own kernel, which gives a row the same bits whatever their number, unlike a GEMM."""
    cpu = cpu_kernels()
    out = table.new_empty(len(table) + cpu.TILE_ROWS, padded_columns(pos.columns))
    args = cpu.RowsForward(
        **common(table),
        rows=len(table),
        columns=pos.inputs,
        x=pointer(table),
        next=pos.args,
        out=pointer(out),
        out_row_stride=out.stride(0),
    )
    cpu.rows_forward(args)
    return out[: len(table)]


def against_bfloat16(width: int) -> str | None:
    """Say why products of ``width`` inputs are not in bfloat16 for a bfloat16 encoder; None: they are.

    Elsewhere the kernels take such products apart, and some processors that have the instruction are slow at it.
    """
    if cpu_kernels().simd_level() != "avx512bf16":
        return "this processor has no AVX512-BF16"
    if width % 2:
        return f"it multiplies by pairs, and d_model is {width}"
    gain = cpu_kernels().bfloat16_gain()
    return None if gain > 1 else f"this processor's products of bfloat16 are {gain:.2f} times as fast as of float32"


def product_dtype(like: Tensor) -> torch.dtype:
    """Dtype of the products with the matrices of a layer, for a weight or input ``like [..., d_model]``."""
    in_float32 = like.dtype != torch.bfloat16 or against_bfloat16(like.shape[-1])
    return torch.float32 if in_float32 else torch.bfloat16


def multiplies_int8() -> bool:
    """Return whether the processor multiplies 8 bits: elsewhere the kernels take such products apart."""
    return cpu_kernels().simd_level() == "avx512bf16"


def pack(layer: nn.Module, overrides: dict[str, Tensor]) -> PackedLayer:
    """Pack a :class:`~lcconformer.ConformerLayer` in evaluation; ``overrides`` replace parameters and buffers by name."""

    def get(name: str) -> Tensor | None:
        if name in overrides:
            return overrides[name].detach()
        owner, _, leaf = name.rpartition(".")
        value = getattr(layer.get_submodule(owner), leaf, None)
        return None if value is None else value.detach()

    def given(name: str) -> Tensor:
        value = get(name)
        assert value is not None, name
        return value.float().contiguous()

    def norm(name: str) -> Affine:
        # copies: what is packed must not change with its source
        return Affine(given(f"{name}.weight").clone(), given(f"{name}.bias").clone())

    qkv, last = get("attention.qkv.weight"), get("norm.weight")
    assert qkv is not None
    assert last is not None
    dtype = product_dtype(qkv if qkv.is_floating_point() else last)

    def matrix(name: str, scale: float = 1.0, dtype: torch.dtype = dtype, group: int | None = None) -> Matrix:
        weight, weight_scale, bias = get(f"{name}.weight"), get(f"{name}.scale"), get(f"{name}.bias")
        if weight_scale is None:
            return Matrix.of(given(f"{name}.weight"), bias, scale, dtype)
        assert weight is not None
        if multiplies_int8():
            return Matrix.of_int8(weight, weight_scale, bias, scale, group=group)
        return Matrix.of(weight * weight_scale[:, None], bias, scale, dtype)

    hidden = cpu_kernels().HIDDEN_COLUMNS

    def feed_forward(name: str) -> FeedForward:
        return FeedForward(norm(f"{name}.norm"), matrix(f"{name}.up"), matrix(f"{name}.down", 0.5, group=hidden))

    own_attention = cast(RelativeAttention, layer.get_submodule("attention"))
    relative = own_attention.position == "relative"
    attention = Attention(
        norm("attention.norm"),
        matrix("attention.qkv"),
        matrix("attention.out"),
        matrix("attention.pos", dtype=torch.float32) if relative else None,
        given("attention.u").clone() if relative else None,
        given("attention.v_bias").clone() if relative else None,
    )

    taps, bias = given("conv.depthwise.weight")[:, 0].t(), get("conv.depthwise.bias")  # [K, C]
    bias = taps.new_zeros(taps.shape[1]) if bias is None else bias.float()
    depthwise_norm = None
    module = layer.get_submodule("conv.depthwise_norm")
    if isinstance(module, nn.BatchNorm1d):
        mean, var, weight, shift = (
            given(f"conv.depthwise_norm.{name}").double() for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight * torch.rsqrt(var + module.eps)
        taps, bias = (taps * scale).float(), ((bias - mean) * scale + shift).float()
    elif not isinstance(module, nn.Identity):
        depthwise_norm = norm("conv.depthwise_norm")
    conv = Convolution(
        norm("conv.norm"),
        matrix("conv.pointwise1"),
        taps.contiguous().clone(),
        bias.clone(),
        depthwise_norm,
        matrix("conv.pointwise2"),
    )
    return PackedLayer(
        feed_forward("ffn1"), attention, conv, feed_forward("ffn2"), norm("norm"), own_attention.heads, dtype
    )


def tells_depths_apart(config: ConformerConfig) -> bool:
    """Whether the loops of one unique layer see weights of their own."""
    return config.conv_norm_statistics == "per_depth" or not {"layer_norm", "lora"}.isdisjoint(config.conditioning)


# --- kept from call to call ------------------------------------------------------------------------------------------


# Frames through all loops, by unique layer, from which all values are compared instead of samples: there it takes 2.5% of the
# call's processor time (at 576 of one layer 2.7% with d_model 256, 2.9% with 512; an AMD EPYC, one thread)
COMPLETE = 640


class Fingerprint:
    """The values of contiguous tensors on the CPU, which stay where they are."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._bytes = torch.tensor([[t.data_ptr(), t.numel() * t.element_size()] for t in tensors], device="cpu")
        self._found = [self._take(complete) for complete in (False, True)]

    def _take(self, complete: bool) -> int:
        return cpu_kernels().fingerprint(pointer(self._bytes), len(self._bytes), complete)

    def holds(self, complete: bool) -> bool:
        """Return whether the values are as they were: all of them if ``complete``, else samples."""
        return self._take(complete) == self._found[complete]


def cacheable(tensor: Tensor) -> bool:
    """Return whether what is made of a tensor can be kept: later writes to it will be noticed."""
    return not tensor.is_inference() and tensor.is_contiguous() and not tensor.is_shared()


class _Packed:
    """The packed layers of one stack, and the state of its tensors when they were packed."""

    def __init__(self, watch: Watch) -> None:
        self.layers: dict[tuple[int, int], PackedLayer] = {}
        elsewhere = {str(t.device) for t in watch.tensors()} - {"cpu"}
        if elsewhere:
            raise ValueError(
                f"ConformerEncoder: the input is on cpu, weights are on {', '.join(elsewhere)}; move one of them"
            )
        self.cacheable = all(map(cacheable, watch.tensors()))
        if not self.cacheable:
            return
        self._watch, self._state = watch, watch.state()
        self._memory = watch.memory()
        self._values = Fingerprint(watch.tensors())

    def holds(self, watch: Watch, complete: bool) -> bool:
        """Whether the tensors are as they were, by every value of theirs or by samples."""
        same = watch is self._watch and watch.state() == self._state
        return same and self._values.holds(complete)

    def layer(self, stack: LayerStack, k: int, apart: bool) -> PackedLayer:
        """Return the packed layer of loop ``k``: one per unique layer, or per loop where depths have weights of their own."""
        index = stack.layer_map[k]
        key = (index, k if apart else -1)
        if key not in self.layers:
            self.layers[key] = pack(stack.layers[index], stack.overrides(k))
        return self.layers[key]


_kept: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()


@torch.no_grad()
def packed(stack: LayerStack, depth: int, frames: int) -> list[PackedLayer]:
    """Return the packed weights of loops 0 ... ``depth - 1``, repacked if the encoder's tensors have changed.

    Args:
        frames: of the whole batch, which tell how long the call will take.
    """
    now, kept = watch(stack), _kept.get(stack)
    if kept is None or not kept.holds(now, depth * frames >= COMPLETE * len(stack.layers)):
        kept = _Packed(now)
        forget(stack)
        if kept.cacheable:
            _kept[stack] = kept
    apart = tells_depths_apart(stack.config)
    return [kept.layer(stack, k, apart) for k in range(depth)]


def forget(stack: LayerStack) -> None:
    """Drop the packed weights of an encoder; the next call packs them anew."""
    _kept.pop(stack, None)
