"""Whether the kernels of a backend can run at all for tensors of a device and a dtype."""

from __future__ import annotations

import importlib.util

import torch

from lcconformer import extension

__all__ = ["capability", "cpu_reasons", "cuda_reasons", "triton_reasons"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _missing() -> str:
    """Return why the extension cannot be used; empty: it can.  A constant of the process, also to a tracer."""
    return extension.why_missing() or ""


def _triton_missing(device_type: str, index: int | None) -> str:
    """Return why Triton cannot serve a device; empty: it can.  A constant of the process, also to a tracer."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'lcconformer[triton]')"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return "" if major >= 8 else f"the GPU is sm_{major}{minor}, older than sm_80"
    if device_type == "cpu":
        from lcconformer.kernels.common import INTERPRETED

        return "" if INTERPRETED else "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    return f"no Triton kernels for device type {device_type!r}"


def capability(device_type: str, index: int | None) -> int:
    """Return what a GPU is, 90 for sm_90; 0 for other devices.  A constant of the process, also to a tracer."""
    if device_type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _cuda_missing(device_type: str, index: int | None) -> list[str]:
    """Return why the CUDA kernels cannot serve a device; empty: they can.  A constant of the process, also to a tracer."""
    if device_type != "cuda":
        return [f"the tensors are on device type {device_type!r}"]
    return extension.cuda_reasons(capability(device_type, index))


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo and triton (over a second)
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpu_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return why no kernel of csrc/cpu can take such tensors."""
    reasons = [_missing()]
    if torch.compiler.is_compiling():
        # the compiler fuses the reference itself, and across the ops
        reasons.append("under torch.compile and torch.export the reference is compiled instead")
    if device.type != "cpu":
        reasons.append(f"the tensors are on device type {device.type!r}")
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"dtype {dtype} is not one of float32, bfloat16")
    return [r for r in reasons if r]


def triton_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return why no Triton kernel can take such tensors."""
    reasons = [_triton_missing(device.type, device.index)]
    if dtype not in _FLOATS:
        reasons.append(f"dtype {dtype} is not one of float16, bfloat16, float32")
    return [r for r in reasons if r]


def cuda_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return why no kernel of csrc/cuda can take such tensors."""
    reasons = list(_cuda_missing(device.type, device.index))
    if dtype not in _FLOATS:
        reasons.append(f"dtype {dtype} is not one of float16, bfloat16, float32")
    return reasons
