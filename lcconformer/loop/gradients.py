"""Sums of a layer's gradients over the loops that use it."""

from __future__ import annotations

import torch
from torch import Tensor

from lcconformer.ops.gemm import weight_gradient

__all__ = ["Gradients"]


class Gradients:
    """Gradients of one layer's parameters, summed over loops in ``dtype`` (float32, or float64) and cast once.

    Args:
        wanted: names of the parameters that need a gradient; the others cost nothing.
        dtype: dtype of the sums.
        loops: number of loops whose rows are joined into one GEMM for a matrix's gradient.
    """

    def __init__(self, wanted: set[str], dtype: torch.dtype, loops: int) -> None:
        self._wanted, self._dtype, self._loops = wanted, dtype, loops
        self._sums: dict[str, Tensor] = {}
        self._pairs: dict[tuple[str, bool], list[tuple[Tensor, Tensor]]] = {}

    def wants(self, matrix: str) -> bool:
        return f"{matrix}.weight" in self._wanted or f"{matrix}.bias" in self._wanted

    def add(self, name: str, gradient: Tensor | None) -> None:
        """Add one loop's gradient of a parameter."""
        if name not in self._wanted or gradient is None:
            return
        if name in self._sums:
            self._sums[name].add_(gradient)
        else:
            self._sums[name] = gradient.to(self._dtype, copy=True)

    def product(self, matrix: str, dy: Tensor, h: Tensor, *, bias: bool = True) -> None:
        """Add one loop of ``y = h W' + b`` with rows ``dy [M, N]`` and ``h [M, K]``; only that of W without ``bias``."""
        if not self.wants(matrix):
            return
        pairs = self._pairs.setdefault((matrix, bias), [])
        pairs.append((dy, h))
        if len(pairs) == self._loops:
            self._flush(matrix, bias)

    def _flush(self, matrix: str, bias: bool) -> None:
        pairs = self._pairs.pop((matrix, bias))
        dy, h = pairs[0] if len(pairs) == 1 else (torch.cat(rows) for rows in zip(*pairs))
        if bias:
            self.add(f"{matrix}.bias", dy.sum(0, dtype=self._dtype))
        name = f"{matrix}.weight"
        if name not in self._wanted:
            return
        total = self._sums.get(name)
        if total is not None and dy.dtype == self._dtype and dy.is_cuda:
            total.addmm_(dy.t(), h)
            return
        # on the CPU a product of bfloat16 rows is rounded to bfloat16 before it is added
        if dy.is_cuda and dy.dtype != self._dtype:
            gradient = torch.mm(dy.t(), h, out_dtype=self._dtype)
        else:
            gradient = weight_gradient(dy, h).to(self._dtype)
        self._sums[name] = gradient if total is None else total.add_(gradient)

    def finish(self) -> dict[str, Tensor]:
        """Return the sums over all loops by parameter name, without the parameters that no loop used."""
        for matrix, bias in list(self._pairs):
            self._flush(matrix, bias)
        return self._sums
