"""What the tests of the CPU kernels share: SIMD levels, threads, gradients, and dropout masks worked out apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer import extension
from lcconformer.ops.registry import backend

if (_reason := extension.why_missing()) is not None:
    pytest.skip(f"no compiled extension: {_reason}", allow_module_level=True)

CPU = extension.load().cpu
LEVELS: list[str] = CPU.simd_levels()
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
FRAMES = (1, 7, 63, 65, 127, 203)


@contextmanager
def kernels(level: str | None = None, threads: int = 2) -> Iterator[None]:
    """The CPU kernels, with the instructions of ``level``."""
    before, threads_before = CPU.simd_level(), torch.get_num_threads()
    CPU.set_simd_level(level or before)
    torch.set_num_threads(threads)
    try:
        with backend("cpu"):
            yield
    finally:
        CPU.set_simd_level(before)
        torch.set_num_threads(threads_before)


def strided(x: Tensor) -> Tensor:
    """The same values, rows apart and starting anywhere, the last dimension dense."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def scattered(x: Tensor) -> Tensor:
    """The same values with no dense dimension."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda x: x, "strided": strided, "scattered": scattered}


def run(
    f: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    dtype: torch.dtype,
    layout: str = "dense",
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all inputs, with inputs and incoming gradients in a dtype and a layout."""
    lay = LAYOUTS[layout]
    leaves = [lay(x.to(dtype)).detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    gradients = torch.autograd.grad(outs, leaves, [lay(g.to(dtype)) for g in grads])
    return [o.detach() for o in outs], list(gradients)
