"""Input checks shared by the ops: each names the argument, what was got, and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .derivatives import transformed

__all__ = [
    "check_device",
    "check_dropout",
    "check_lengths",
    "check_same",
    "check_shape",
    "check_tensor",
    "floats",
    "frame_mask",
    "readable",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, x: object) -> None:
    """``x`` is a tensor, and no list or array."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} is a {type(x).__name__}; expected a tensor, such as torch.as_tensor makes")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], letters: str) -> None:
    """``x`` has the shape; ``None`` leaves a dimension free; ``letters`` names them, as in ``"[B, T, C]"``."""
    check_tensor(op, name, x)
    if x.shape == shape:  # the common case, without a generator
        return
    if x.dim() != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape)):
        want_text = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected {letters} = {want_text}")


def check_same(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point and agree in dtype and device with the first."""
    first, ref = "", None
    for name, t in tensors.items():
        if t is None:
            continue
        check_tensor(op, name, t)
        if ref is None:
            first, ref, dtype, device = name, t, t.dtype, t.device
            if dtype not in FLOATS:
                raise ValueError(
                    f"{op}: {first} has dtype {dtype}; expected one of float16, bfloat16, float32, float64"
                )
        elif t.dtype != dtype:
            raise ValueError(f"{op}: {name} has dtype {t.dtype} but {first} has {dtype}; cast them to one dtype")
        elif t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device} but {first} is on {device}; move them to one device")


def check_device(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """All given tensors are on the device of ``x``."""
    device = x.device
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device} but x is on {device}; move them to one device")


def check_dropout(op: str, dropout_p: float) -> None:
    """``dropout_p`` is a probability below 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")


def check_lengths(op: str, lengths: Tensor | None, batch: int, frames: int, device: torch.device) -> None:
    """``lengths`` is int32 or int64 ``[B]`` on ``device``.

    The values (0 <= lengths <= T) are checked only where they are :func:`readable`.
    """
    if lengths is None:
        return
    check_tensor(op, "lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: lengths has dtype {lengths.dtype}; expected int64 or int32 frame counts; pass lengths.long()"
        )
    check_shape(op, "lengths", lengths, (batch,), "[B]")
    if lengths.device != device:
        raise ValueError(f"{op}: lengths is on {lengths.device} but the input is on {device}; move it there")
    if batch and readable(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > frames:
            raise ValueError(f"{op}: lengths span {low} ... {high}; expected values from 0 to T = {frames}")


def readable(x: Tensor) -> bool:
    """Return whether the host can look at the values of ``x`` at no cost.

    On a GPU that takes a synchronisation, under compilation a graph break; ``torch.jit.trace`` would take them for
    constants; a fake tensor has no values, and under ``vmap`` a tensor stands for many.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not tracing and x.device.type == "cpu" and type(x) is Tensor and not transformed()


def floats(*values: float) -> tuple[float, ...]:
    """The values as floats, for an autograd.Function.

    With dynamic shapes Dynamo makes a graph input of a float where it first meets it.  If that is inside a Function, the
    input belongs to that Function's graph, and the next Function to use it fails ("lift_tracked_freevar_to_input should
    not be called on root SubgraphTracer", torch 2.13).  So it is to meet all floats here.
    """
    return tuple(float(v) for v in values)


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """``[B, T]`` bool, True at real frames."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]
