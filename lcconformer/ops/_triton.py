"""Whether Triton kernels can run where a tensor lies."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["dropout_seed", "triton_reasons"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _device_reason(device_type: str, index: int | None) -> str:
    """Why Triton cannot serve this device; empty = it can.  A constant of the process, also to a tracer."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'lcconformer[triton]')"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return "" if major >= 8 else f"the GPU is sm_{major}{minor}, older than sm_80"
    if device_type == "cpu":
        from lcconformer.kernels._common import INTERPRETED

        return "" if INTERPRETED else "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    return f"no Triton kernels for device type {device_type!r}"


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo and triton (over a second)
_device_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_reasons(x: Tensor) -> list[str]:
    """Why no Triton kernel can take ``x``: its device or its dtype."""
    reasons = [_device_reason(x.device.type, x.device.index)]
    if x.dtype not in _DTYPES:
        reasons.append(f"dtype {x.dtype} is not one of float16, bfloat16, float32")
    return [r for r in reasons if r]


def dropout_seed(x: Tensor, dropout_p: float, shape: tuple[int, ...] = (1,)) -> Tensor | None:
    """Key of the counter-based dropout, int64 ``[1]`` on the device of ``x``, or many; None without dropout.

    Drawn from the generator of the device: no synchronisation, fresh at every replay of a CUDA graph, and repeated by
    activation checkpointing.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, device=x.device)
