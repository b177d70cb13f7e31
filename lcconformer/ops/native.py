"""How tensors are handed to the kernels of csrc/.

A kernel takes an object of its arguments, e.g. ``cpu.rows_forward(cpu.RowsForward(x=pointer(x), ...))``; the structs in
csrc/cpu/kernels.h say what the fields are.  The object holds addresses, so the caller keeps the tensors alive.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lcconformer import extension

__all__ = ["common", "cpu_kernels", "dropout", "f32", "i64", "pointer", "rows_of", "unit_stride"]

_ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def cpu_kernels() -> ModuleType:
    """``_C.cpu``: the kernels, the classes of their arguments, and constants.

    Raises:
        ImportError: the extension is missing or does not fit this source.
    """
    return extension.load().cpu


@functools.cache
def _element(dtype: torch.dtype) -> Any:
    return getattr(cpu_kernels().Element, _ELEMENTS[dtype])


def common(x: Tensor) -> dict[str, Any]:
    """Arguments of every kernel: the element type of the big tensors, which ``x`` is one of, and the number of threads."""
    return {"element": _element(x.dtype), "threads": torch.get_num_threads()}


def pointer(x: Tensor | None, element: int = 0) -> int:
    """Address of an element of ``x``, counted in memory from the first one; 0 without a tensor."""
    if x is None:
        return 0
    return x.data_ptr() + element * x.element_size() if element else x.data_ptr()


def unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """``[..., D] -> [M, D]`` with unit stride in D, a view where the strides allow it."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def f32(x: Tensor | None) -> Tensor | None:
    """Parameters and statistics go to the kernels as contiguous float32."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def i64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def dropout(seed: Tensor | None, p: float) -> Any:
    """``cpu.Dropout``; without a seed nothing is dropped."""
    return cpu_kernels().Dropout(pointer(seed), p)
