"""The kernels of an op, by backend: modules with the same ``forward`` and ``backward``."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["fused_kernels"]


def fused_kernels(op: str, backend: str) -> ModuleType:
    """``lcconformer.kernels.<op>`` for ``"triton"``, ``lcconformer.ops._<backend>_<op>`` for ``"cpu"`` and ``"cuda"``."""
    name = f"kernels.{op}" if backend == "triton" else f"ops._{backend}_{op}"
    return importlib.import_module(f"lcconformer.{name}")
