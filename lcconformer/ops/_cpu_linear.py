"""Matrix products on the CPU by the faster of the two libraries inside PyTorch.

For float32, PyTorch sends products to MKL; its own oneDNN was 1.05 to 1.25 times as fast on an AMD processor with
AVX-512 (100 to 3,200 rows, 256 to 1,024 columns, one thread; the gradient of the weight alone was not). bfloat16 goes to
oneDNN by itself.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["matmul_transposed"]


@functools.cache
def _onednn() -> bool:
    """Whether this PyTorch has oneDNN's linear, with the signature used here."""
    try:
        eye = torch.eye(4)
        y = torch.ops.mkldnn._linear_pointwise(eye, eye.t(), eye[0], "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(y, eye + eye[0])


def _served(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and weight.numel() > 0
        and _onednn()
    )


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight [N, K].T + bias [N]``, without autograd."""
    if not _served(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
