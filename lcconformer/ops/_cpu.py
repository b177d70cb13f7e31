"""What the ops share on the CPU kernels of csrc/cpu: whether those can run, and how tensors are handed over.

A kernel takes an object of its arguments, e.g. ``cpu.rows_forward(cpu.RowsForward(x=pointer(x), ...))``; the structs in
csrc/cpu/kernels.h say what the fields are.  The object holds addresses, so the caller keeps the tensors alive.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lcconformer import _extension

__all__ = ["common", "cpu_kernels", "cpu_reasons", "dropout", "f32", "i64", "pointer", "rows_of", "unit_stride"]

_ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _missing() -> str:
    """Why the extension cannot be used; empty = it can.  A constant of the process, also to a tracer."""
    return _extension.why_missing() or ""


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpu_reasons(x: Tensor) -> list[str]:
    """Why no CPU kernel can take ``x``: the extension, its device or its dtype."""
    reasons = [_missing()]
    if torch.compiler.is_compiling():
        # the compiler fuses the reference itself, and across the ops
        reasons.append("under torch.compile and torch.export the reference is compiled instead")
    if x.device.type != "cpu":
        reasons.append(f"the tensors are on device type {x.device.type!r}")
    if x.dtype not in _ELEMENTS:
        reasons.append(f"dtype {x.dtype} is not one of float32, bfloat16")
    return [r for r in reasons if r]


def cpu_kernels() -> ModuleType:
    """``_C.cpu``: the kernels, the classes of their arguments, and constants.

    Raises:
        ImportError: the extension is missing or does not fit this source.
    """
    return _extension.load().cpu


def common(x: Tensor) -> dict[str, Any]:
    """Arguments of every kernel: the element type of the big tensors, which ``x`` is one of, and the number of threads."""
    return {"element": getattr(cpu_kernels().Element, _ELEMENTS[x.dtype]), "threads": torch.get_num_threads()}


def pointer(x: Tensor | None, element: int = 0) -> int:
    """Address of an element of ``x``, counted in memory from the first one; 0 without a tensor."""
    return 0 if x is None else x.data_ptr() + element * x.element_size()


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


def dropout(seed: Tensor | None, p: float) -> Any:
    """``cpu.Dropout``; without a seed nothing is dropped."""
    return cpu_kernels().Dropout(pointer(seed), p)
