"""The floor: floating-point operations and fewest bytes of the maths, over what this machine was measured to do.

FLOPs count what the maths needs, a multiply-add as two: the position scores of the T keys that the shift keeps (not all
2T-1), no recomputation.  Bytes count every input read once and every output written once; inside the encoder nothing
leaves the chip except, in training, what the backward pass needs of the forward.  No implementation can be faster than
its floor, ``max(FLOPs / GEMM rate, bytes / copy rate)``, if the ceilings are right and the data exceeds the caches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lcconformer.ops._cpu_linear import matmul_transposed

from .case import Case

__all__ = ["Ceilings", "Work", "floor_ms", "measure_ceilings", "work"]


@dataclass(frozen=True)
class Work:
    """``flops`` and ``bytes`` that cannot be avoided."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """Measured on this machine: ``gemm_tflops`` of a large matrix product, ``copy_gb_s`` of a large copy (read + write)."""

    gemm_tflops: float
    copy_gb_s: float


def _attention_flops(c: Case, position: str) -> float:
    # content scores, position scores, probabilities times values
    return (6 if position == "relative" else 4) * c.batch * c.frames**2 * c.d_model


def layer_flops(c: Case, position: str = "relative") -> float:
    """Forward FLOPs of one layer without the position projection, which loops share."""
    matrices = 2 * c.batch * c.frames * (4 * c.d_model * c.ffn_dim + 7 * c.d_model**2)
    return matrices + _attention_flops(c, position) + 2 * c.kernel * c.batch * c.frames * c.d_model


def layer_parameters(c: Case) -> int:
    """Parameters of one layer with relative positions, biases and norms included."""
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
    # kept per loop, written once and read once: 5 residual states, q, k, v, attention output, GLU input (2), depthwise
    # output, and both feed-forward hidden states; everything else follows from them without a matrix product
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
    # forward, then inputs and output gradients read, input and parameter gradients written
    return Work(3 * flops, 3 * parameters + 3 * read + 2 * written)


def work(case: Case, position: str = "relative") -> Work:
    """Of one call (inference, op forward) or one step (training).  ``position="none"``: without relative positions."""
    return _op(case) if case.op else _encoder(case, position)


def floor_ms(w: Work, ceilings: Ceilings) -> float:
    """Milliseconds below which no version runs."""
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
    """The two rates of the case's device and dtype: the best of several runs on random data."""
    large = case.device == "cuda"
    dtype = torch.bfloat16 if case.dtype == "amp" else case.torch_dtype
    n = 8192 if large else 1024
    a, b = (torch.randn(n, n, device=case.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = _best_seconds(lambda: torch.mm(a, b, out=out), case.device, 10 if large else 5)
    if not large:  # PyTorch has two libraries there, and which is faster depends on the processor
        gemm = min(gemm, _best_seconds(lambda: matmul_transposed(a, b), case.device, 5))
    source = torch.randn((1 << 28) if large else (1 << 24), device=case.device)  # 1 GiB, 64 MiB
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), case.device, 10 if large else 5)
    return Ceilings(2 * n**3 / gemm / 1e12, 2 * source.nbytes / copy / 1e9)
