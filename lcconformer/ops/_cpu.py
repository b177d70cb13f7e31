"""What the ops share on the CPU kernels of csrc/cpu: whether those can run, and how tensors are handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcconformer import _extension

__all__ = ["cpu_reasons", "dropout", "f32", "i64", "pointer", "rows_of", "run", "unit_stride"]

_DTYPES = (torch.float32, torch.bfloat16)


def _missing() -> str:
    """Why the extension cannot be used; empty = it can.  A constant of the process, also to a tracer."""
    reason = _extension.why_missing()
    if reason is None and not hasattr(_extension.load().cpu, "rows_forward"):
        reason = "lcconformer._C is older than this source; reinstall lcconformer"
    return reason or ""


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
    if x.dtype not in _DTYPES:
        reasons.append(f"dtype {x.dtype} is not one of float32, bfloat16")
    return [r for r in reasons if r]


def run(kernel: str, like: Tensor, **fields: Any) -> None:
    """Call a kernel with the fields of its struct in csrc/cpu/kernels.h; ``like`` tells the element type."""
    call: Callable[..., None] = getattr(_extension.load().cpu, kernel)
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
