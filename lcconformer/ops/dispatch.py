"""Calls of the kernels behind the operators past PyTorch's dispatcher, which in Python costs more than a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .derivatives import transformed

__all__ = ["undispatched"]

# types of arguments that a kernel takes as they are: no subclass of tensors, and no symbol
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})


def _watched() -> bool:
    """Return whether a compiler, a tracer, a mode, a transform or the profiler would see an operator that is called."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transformed()
        or torch.autograd._profiler_enabled()
    )


def undispatched(operator: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``operator``, or the ``kernel`` behind it where nobody can tell the difference.

    It is for code that autograd does not record.  The dispatcher boxes every argument on its way to a kernel in Python, which
    for a few frames takes a good part of the time of the kernel itself.
    """

    def call(*args: Any, **options: Any) -> Any:
        if _PLAIN.issuperset(map(type, args)) and not _watched():
            return kernel(*args, **options)
        return operator(*args, **options)

    return call
