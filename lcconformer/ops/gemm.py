"""Matrix products on the CPU by the faster of the two libraries inside PyTorch.

For float32, PyTorch sends products to MKL. Its own oneDNN was 1.05 to 1.25 times as fast on one AMD EPYC with AVX-512, and
1.6 to 2.3 times on another, where MKL reached 205 GFLOP/s on two cores (100 to 3,200 rows, 256 to 1,024 columns; gradients of
weights, measured there alone: 1.2 to 2.2 times). MKL was as fast or faster on an Intel Xeon with AVX-512 (one thread; times as
fast: 1.0 to 2.6 at 16 rows, 1.0 to 1.4 at 100, 0.96 to 1.2 at 400 and 1,600), and on an AMD EPYC without AVX-512 (one thread;
1.2 to 2.1 at 16 rows, 1.0 to 1.5 at 50 to 3,200). bfloat16 goes to oneDNN by itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["matmul_transposed", "weight_gradient"]

_FEW_ROWS = 256  # of them a gradient in another layout than its weight's costs more than it gains


@functools.cache
def _onednn() -> bool:
    """Whether this PyTorch has oneDNN's linear, with the signature used here."""
    try:
        eye = torch.eye(4)
        y = torch.ops.mkldnn._linear_pointwise(eye, eye.t(), eye[0], "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(y, eye + eye[0])


@functools.cache
def _mkl_leads() -> bool:
    """Whether MKL is the faster one on this processor: an Intel one, or one without AVX-512."""
    if not torch.cpu._is_avx512_supported():
        return True
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False


def _served(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and weight.numel() > 0
        and not _mkl_leads()
        and _onednn()
    )


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight [N, K].T + bias [N]``, without autograd."""
    if not _served(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dy [M, N].T @ x [M, K]``, without autograd: the gradient of the weight of ``y = x @ weight.T``."""
    if not _served(x, dy):
        return torch.mm(dy.t(), x)
    # the wider one where oneDNN expects a weight: 406 GFLOP/s at M, N, K = 3200, 1024, 256, the other way round 276, MKL 200;
    # autograd then copies the gradient into the layout of the weight
    if dy.shape[1] >= x.shape[1] and len(x) > _FEW_ROWS:
        return matmul_transposed(x.t(), dy.t()).t()
    return matmul_transposed(dy.t(), x.t())
