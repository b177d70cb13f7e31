"""The roofline: minimum work of a case, measured ceilings of the machine, and the time that follows from both.

FLOPs are those the maths needs, a multiply-add counting as two: position scores of the T keys that the shift keeps (not of
all 2T-1), no recompute.  Bytes are every input read once and every output written once; inside the encoder nothing leaves
the chip except, in training, what the forward keeps for the backward.  The floor ``max(FLOPs / GEMM rate, bytes / copy
rate)`` bounds every implementation from below, provided that the ceilings are right and the data exceeds the caches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lcconformer.ops.gemm import matmul_transposed

from .case import Case

__all__ = ["Ceilings", "Work", "floor_ms", "measure_ceilings", "work"]


@dataclass(frozen=True)
class Work:
    """Minimum FLOPs and bytes of memory traffic."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine: a large GEMM in TFLOP/s, a large copy in GB/s (bytes read and written)."""

    gemm_tflops: float
    copy_gb_s: float


def _attention_flops(c: Case, position: str) -> float:
    # content scores, position scores, probabilities times values
    return (6 if position == "relative" else 4) * c.batch * c.frames**2 * c.d_model


def layer_flops(c: Case, position: str = "relative") -> float:
    """FLOPs of one layer's forward, without the projection of positions, which all loops share."""
    matrices = 2 * c.batch * c.frames * (4 * c.d_model * c.ffn_dim + 7 * c.d_model**2)
    return matrices + _attention_flops(c, position) + 2 * c.kernel * c.batch * c.frames * c.d_model


def layer_parameters(c: Case) -> int:
    """Number of parameters of one layer with relative positions, biases and norms included."""
    d, f = c.d_model, c.ffn_dim
    return 4 * d * f + 2 * (f + d) + 8 * d * d + 10 * d + c.kernel * d + 12 * d


def _encoder(c: Case, position: str) -> Work:
    n, size = c.depth, c.element_size
    flops = n * layer_flops(c, position)
    if position == "relative":
        flops += 2 * (2 * c.frames - 1) * c.d_model**2
    activation = c.batch * c.frames * c.d_model * size
    weights = layer_parameters(c) * size
    if not c.backward:
        return Work(flops, weights + 2 * activation)
    # each loop writes once and reads once: 5 residual states, q, k, v, attention output, GLU input (2), depthwise output, and
    # both hidden states of the feed-forward modules; the backward can recompute everything else without a GEMM
    kept = 12 * activation + 2 * c.batch * c.frames * c.ffn_dim * size
    return Work(3 * flops, 3 * weights + 4 * activation + 2 * n * kept)


def _op(c: Case) -> Work:
    b, t, d, f, k, s = c.batch, c.frames, c.d_model, c.ffn_dim, c.kernel, c.element_size
    x = b * t * d * s
    if c.op == "relpos_attention":
        flops, parameters, read, written = _attention_flops(c, "relative"), ((2 * t - 1) * d + 2 * d) * s, 3 * x, x
    elif c.op == "glu_depthwise_conv":
        flops, parameters, read, written = 2 * k * b * t * d, (k + 3) * d * s, 2 * x, x
    elif c.op == "feed_forward":
        flops, parameters, read, written = 4 * b * t * d * f, (2 * d * f + f + 3 * d) * s, x, x
    else:
        flops, parameters, read, written = 0, 2 * d * s, 2 * x, 2 * x
    if not c.backward:
        return Work(flops, parameters + read + written)
    # the forward; then the backward reads inputs and output gradients, writes input and parameter gradients
    return Work(3 * flops, 3 * parameters + 3 * read + 2 * written)


def work(case: Case, position: str = "relative") -> Work:
    """Minimum work of one call (inference, forward of an op) or one step (training).

    Args:
        case: what is run.
        position: ``"relative"``, or ``"none"`` for an encoder without relative positions.
    """
    return _op(case) if case.op else _encoder(case, position)


def floor_ms(w: Work, ceilings: Ceilings) -> float:
    """Least possible time in milliseconds."""
    return max(w.flops / (ceilings.gemm_tflops * 1e12), w.bytes / (ceilings.copy_gb_s * 1e9)) * 1e3


def _best_seconds(call, device: str, repeats: int) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure_ceilings(case: Case) -> Ceilings:
    """Measure the rates of the case's device in its dtype: the best of several runs on random data."""
    large = case.device == "cuda"
    dtype = torch.bfloat16 if case.dtype == "amp" else case.torch_dtype
    n = 8192 if large else 1024
    a, b = (torch.randn(n, n, device=case.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = _best_seconds(lambda: torch.mm(a, b, out=out), case.device, 10 if large else 5)
    if not large:  # PyTorch has two GEMM libraries on a CPU; which is faster depends on the processor
        gemm = min(gemm, _best_seconds(lambda: matmul_transposed(a, b), case.device, 5))
    source = torch.randn((1 << 28) if large else (1 << 24), device=case.device)  # 1 GiB, 64 MiB
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), case.device, 10 if large else 5)
    return Ceilings(2 * n**3 / gemm / 1e12, 2 * source.nbytes / copy / 1e9)
