"""How tensors are handed to the kernels of csrc/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcconformer import extension

__all__ = ["dropout", "f32", "i64", "pointer", "rows_of", "run", "unit_stride"]


def run(kernel: str, like: Tensor, **fields: Any) -> None:
    """Call a kernel with the fields of its struct in csrc/cpu/kernels.h; ``like`` tells the element type."""
    call: Callable[..., None] = getattr(extension.load().cpu, kernel)
    call(bf16=like.dtype == torch.bfloat16, threads=torch.get_num_threads(), **fields)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """``[..., D] -> [M, D]`` with unit stride in D, a view where the strides allow it."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def f32(x: Tensor | None) -> Tensor | None:
    """Parameters and statistics go to the kernels as contiguous float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def i64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


_LEVELS = 1 << 16


def dropout(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """Pointer to the seed, threshold and scale; the same as lcconformer.kernels._common computes."""
    threshold = min(round(p * _LEVELS), _LEVELS - 1)
    return pointer(seed), threshold, _LEVELS / (_LEVELS - threshold)
