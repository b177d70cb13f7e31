"""Modelled times on an H200: matrix products, pointwise kernels, launch gaps, and the encoders that ours is compared with.

Eager PyTorch and torch.compile (``mode="reduce-overhead"``) are lists of kernels with their FLOPs and bytes, as a bfloat16
Conformer with relative positions would launch them: every eager operation reads and writes its tensors; the compiler fuses
chains of pointwise operations and leaves matrix products, convolutions and scores in memory.  Nothing here was measured by
this project unless it says so; a number that was assumed is marked ASSUMED, to be replaced by a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Encoder", "Op", "baseline", "baseline_seconds", "gap_seconds", "product_seconds", "traffic_seconds"]

GEMM = 790e12  # FLOP/s in bfloat16, 8192^3, measured on an H200
# FLOP/s of attention's products, the recomputed ones and those beside the band of positions included: a good kernel of heads
# of 64 at T = 400 to 1500 (plain FlashAttention-3 reaches 333 to 460 on an H100); the backward ASSUMED
ATTENTION, ATTENTION_BACKWARD = 320e12, 300e12
FMA = 60e12  # float32 FLOP/s of the CUDA cores, of 67 on the datasheet
DRAM = 4.3e12  # bytes/s, copy, measured on an H200
L2 = 5.5e12  # bytes/s; published: 5.5 to 7 on an H100
L2_FITS = 25e6  # bytes of an operation below which the L2 cache serves it
SMS = 132
RAMP = 1.24e-6  # from kernel to kernel inside a CUDA graph (H100, revollllt/flash-vla, sm90/constants.yaml)
FILL = 1.0e-6  # until the pipeline of a kernel is full, and its end; ASSUMED
PDL = 0.6e-6  # what programmatic dependent launch leaves of both, weights loaded ahead; ASSUMED
ISSUE = 5.0e-6  # host time of a kernel in eager PyTorch, of 4 to 6 published; ASSUMED

# tile and the share of the peak that its main loop reaches; cuBLAS, ASSUMED
_TILES = ((128, 256, 0.92), (128, 128, 0.85), (128, 64, 0.70), (64, 128, 0.70), (64, 64, 0.55), (64, 32, 0.40))


def traffic_seconds(size: float, efficiency: float = 0.85) -> float:
    """Time of a kernel that is bound by ``size`` bytes, the whole of them in the L2 cache or none."""
    return size / ((L2 if size < L2_FITS else DRAM) * efficiency)


def product_seconds(shape: tuple[int, int, int, int], size: float) -> float:
    """Time of a product of (batch, M, N, K) that moves ``size`` bytes: best tile, whole waves, K split where that helps."""
    batch, m, n, k = shape
    best = math.inf
    for tile_m, tile_n, efficiency in _TILES:
        tiles = batch * math.ceil(m / tile_m) * math.ceil(n / tile_n)
        rate = GEMM / SMS * efficiency
        for split in (1, 2, 4, 8, 16, 32, 64):
            if split > 1 and (k / split < 256 or tiles * split > 4 * SMS):
                break
            seconds = math.ceil(tiles * split / SMS) * 2.0 * tile_m * tile_n * (k / split) / rate
            if split > 1:
                seconds += 1.5e-6 + split * batch * m * n * 8 / L2
            best = min(best, seconds)
    return max(best, traffic_seconds(size, 0.9))


def gap_seconds(*, dependent: bool = False, filled: bool = False) -> float:
    """Time between kernels of a graph; with programmatic dependent launch, or where the model of the kernel has its fill."""
    return PDL if dependent else RAMP + (0.0 if filled else FILL)


@dataclass(frozen=True)
class Encoder:
    """Sizes: B utterances of T frames, d_model wide, heads of 64, hidden layers of 4 d_model; bfloat16."""

    batch: int
    frames: int
    d_model: int
    layers: int = 12
    kernel: int = 31

    @property
    def rows(self) -> int:
        return self.batch * self.frames


@dataclass(frozen=True)
class Op:
    """One or more kernels of a layer: FLOPs of the CUDA cores or a product, bytes, launches; ``once`` for all loops."""

    name: str
    bytes: float
    product: tuple[int, int, int, int] | None = None
    fma: float = 0.0
    launches: int = 1
    efficiency: float = 0.85
    once: bool = False

    @property
    def seconds(self) -> float:
        if self.product:
            return product_seconds(self.product, self.bytes)
        if self.fma:
            rate = L2 if self.bytes / self.launches < L2_FITS else DRAM
            return max(self.fma / FMA, self.bytes / rate) / self.efficiency
        rate = L2 if self.bytes / max(self.launches, 1) < L2_FITS else DRAM
        return self.bytes / (rate * self.efficiency)


class _Layer:
    """Collects the kernels of a layer's forward and backward."""

    def __init__(self, encoder: Encoder, training: bool, compiled: bool) -> None:
        self.e, self.training, self.compiled = encoder, training, compiled
        self.ops: list[Op] = []

    def product(self, name: str, m: int, n: int, k: int, batch: int = 1, forward: bool = True) -> None:
        if forward or self.training:
            self.ops.append(Op(name, 2.0 * batch * (m * k + n * k + m * n), (batch, m, n, k)))

    def pointwise(
        self, name: str, size: float, backward: float = 0.0, n: int = 1, backward_n: int = 1, efficiency: float = 0.85
    ) -> None:
        """``size`` bytes read and written by the forward, ``backward`` by its gradient."""
        if size:
            self.ops.append(Op(name, size, launches=n, efficiency=efficiency))
        if self.training and backward:
            self.ops.append(Op(f"{name}.bwd", backward, launches=backward_n, efficiency=efficiency))

    def linear(self, name: str, into: int, out: int) -> None:
        m = self.e.rows
        self.product(name, m, out, into)
        if not self.training:
            return
        self.product(f"{name}.dx", m, into, out)
        self.product(f"{name}.dw", into, out, m)
        self.ops.append(Op(f"{name}.db", 2.0 * (m * out + out)))
        weight = 2.0 * into * out
        if self.compiled:  # one fused sum over the loops
            self.ops.append(Op(f"{name}.sum", (self.e.layers + 1) * weight, launches=2, once=True))
        else:  # autograd adds the gradients of the loops one by one
            self.ops.append(Op(f"{name}.sum", 3 * weight, launches=2))


def baseline(e: Encoder, *, training: bool, compiled: bool) -> list[Op]:
    """List the kernels of one layer of eager PyTorch, or of torch.compile, with weights shared by all loops."""
    d, t, b, m, h = e.d_model, e.frames, e.batch, e.rows, e.d_model // 64
    hidden, length = 4 * d, 2 * e.frames - 1
    x, f = 2.0 * m * d, 2.0 * m * hidden  # bytes of an activation, of a hidden activation
    s, s2 = 2.0 * b * h * t * t, 2.0 * b * h * t * length  # of scores, of position scores before the shift
    pos, mask = 2.0 * length * d, float(m * d)
    layer = _Layer(e, training, compiled)
    eager, dropout = not compiled, training
    pointwise, product, linear = layer.pointwise, layer.product, layer.linear

    def norm(name: str) -> None:
        pointwise(f"{name}.ln", 2 * x, 4 * x, backward_n=2)

    def residual(name: str) -> None:
        pointwise(f"{name}.res", 3 * x, 3 * x)

    def feed_forward(name: str) -> None:
        if eager:
            norm(name)
        linear(f"{name}.up", d, hidden)
        pointwise(f"{name}.silu", 2 * f, 3 * f)
        if dropout and eager:
            pointwise(f"{name}.drop1", 2.5 * f, 2.5 * f)
        linear(f"{name}.down", hidden, d)
        if compiled:
            pointwise(f"{name}.res+ln", 4 * x, 6 * x, backward_n=2)
            return
        if dropout:
            pointwise(f"{name}.drop2", 2 * x + mask, 2 * x + mask)
        pointwise(f"{name}.half", 2 * x, 2 * x)
        residual(name)

    feed_forward("ffn1")
    if eager:
        norm("mha")
    for name in ("q", "k", "v"):
        linear(f"mha.{name}", d, d)
    product("mha.pos", length, d, d)
    if training:
        product("mha.pos.dw", d, d, length)
        layer.ops.append(Op("mha.pos.sum", 6.0 * d * d))
    if compiled:
        pointwise("mha.q+u,q+v,copies", 10 * x, 10 * x, n=3, backward_n=3, efficiency=0.7)
    else:
        pointwise("mha.q+u", 2 * x, 2 * x)
        pointwise("mha.q+v", 2 * x, 2 * x)
        copies = 8 * x + (1 + b) * pos
        pointwise("mha.copies", copies, copies, n=5, backward_n=5, efficiency=0.6)
    product("mha.content", t, t, 64, b * h)
    product("mha.position", t, length, 64, b * h)
    product("mha.position.dq", t, 64, length, b * h, forward=False)
    product("mha.position.dp", length, 64, t, b * h, forward=False)
    if training:
        layer.ops.append(Op("mha.position.dp.sum", (b + 1) * pos))
    if compiled:
        pointwise("mha.shift+softmax", s2 + 2 * s, 3 * s + s2, n=2, backward_n=2)
        if dropout:
            pointwise("mha.drop", s / 2, s / 2)
    else:
        pointwise("mha.shift", 2 * s2, 2 * s2, n=2, backward_n=2)
        pointwise("mha.add", 3 * s)
        pointwise("mha.scale", 2 * s, 2 * s)
        pointwise("mha.mask", 2 * s, 2 * s, n=2)
        pointwise("mha.softmax", 2 * s, 3 * s)
        pointwise("mha.mask0", 2 * s, 2 * s, n=2)
        if dropout:
            pointwise("mha.drop", 2.5 * s, 2.5 * s)
    product("mha.values", t, 64, t, b * h)
    product("mha.values.da", t, t, 64, b * h, forward=False)
    for name in ("values.dv", "content.dq", "content.dk"):
        product(f"mha.{name}", t, 64, t, b * h, forward=False)
    pointwise("mha.copy", 2 * x, 2 * x, efficiency=0.6)
    linear("mha.out", d, d)
    if compiled:
        pointwise("mha.res+ln", 4 * x, 6 * x, backward_n=2)
    else:
        if dropout:
            pointwise("mha.drop2", 2 * x + mask, 2 * x + mask)
        residual("mha")
        norm("conv")
    pointwise("conv.transpose", 2 * x, 2 * x, efficiency=0.6)
    linear("conv.pw1", d, 2 * d)
    pointwise("conv.glu", 3 * x, 5 * x)
    fma = 2.0 * e.kernel * m * d
    # a depthwise convolution reaches 30% of its bound, its gradient 15%: ASSUMED
    layer.ops.append(Op("conv.depthwise", 2 * x, fma=fma, efficiency=0.30))
    if training:
        layer.ops.append(Op("conv.depthwise.bwd", 4 * x, fma=2 * fma, launches=3, efficiency=0.15))
    statistics = x if training else 0.0
    phases = 2 if training else 1
    if compiled:
        pointwise("conv.bn+silu", 2 * x + statistics, 6 * x, n=phases, backward_n=2)
    else:
        pointwise("conv.bn", 2 * x + statistics, 5 * x, n=phases, backward_n=2)
        pointwise("conv.silu", 2 * x, 3 * x)
    linear("conv.pw2", d, d)
    if compiled:
        pointwise("conv.res+ln", 4 * x, 6 * x, backward_n=2)
    else:
        pointwise("conv.transpose2", 2 * x, 2 * x, efficiency=0.6)
        if dropout:
            pointwise("conv.drop", 2 * x + mask, 2 * x + mask)
        residual("conv")
    feed_forward("ffn2")
    norm("final")
    return layer.ops


def baseline_seconds(e: Encoder, *, training: bool, compiled: bool) -> float:
    """Time of all layers: of the GPU, or of the host that issues eager kernels where that takes longer."""
    gpu = launches = 0.0
    for op in baseline(e, training=training, compiled=compiled):
        times = 1 if op.once else e.layers
        gpu += times * (op.seconds + op.launches * gap_seconds())
        launches += times * op.launches
    return gpu if compiled else max(gpu, launches * ISSUE)
