"""Sums of a layer's gradients over the loops that use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcconformer.ops.gemm import weight_gradient

__all__ = ["Accumulate", "Gradients", "add_partial_sums"]

# (parts [P, ...], total, offsets): add the sum over P of each part to the flat total, from its offset on
Accumulate = Callable[[Sequence[Tensor], Tensor, Sequence[int]], None]


def add_partial_sums(parts: Sequence[Tensor], total: Tensor, offsets: Sequence[int]) -> None:
    """Add the sum over the first dimension of each part to the flat ``total``, from its offset on, in plain PyTorch."""
    for part, at in zip(parts, offsets):
        sums = part[0] if len(part) == 1 else part.sum(0)
        total[at : at + sums.numel()].view(sums.shape).add_(sums)


class Gradients:
    """Gradients of one layer's parameters, summed over its loops in float32, or float64.

    The gradient of a matrix comes from GEMMs whose rows are those of up to ``group`` loops: with more than one, the operands
    are written into slabs ``[group, M, N]``, which a GEMM reads as ``[group M, N]`` without copying.  All other gradients come
    as partial sums and are added up once a loop.

    Args:
        wanted: names of the parameters that need a gradient; the others cost nothing.
        total: zeros in the dtype of the sums, at least as many as there are elements in vectors, taps and positions.
        group: number of loops whose rows go into one GEMM for a matrix's gradient.
        accumulate: adds up the partial sums of a loop.
        on_gpu: whether a GEMM of half precision can add to float32 sums, which only those of a GPU do.
    """

    def __init__(self, wanted: set[str], total: Tensor, group: int, accumulate: Accumulate, on_gpu: bool) -> None:
        self._wanted, self._total, self._dtype = wanted, total, total.dtype
        self._group, self._accumulate, self._on_gpu = group, accumulate, on_gpu
        self._matrices: dict[str, Tensor] = {}
        # operands of a group's GEMMs: (matrix, "dy" or "h") -> [group, M, N]
        self._slabs: dict[tuple[str, str], Tensor] = {}
        self._first, self._slot = -1, 0  # slots in use; -1: none
        # partial sums of the present loop, by the names that share them, and the places of all of them in the total
        self._parts: dict[tuple[str, ...], Tensor] = {}
        self._places: dict[tuple[str, ...], tuple[int, torch.Size]] = {}
        self._end = 0

    def wants(self, matrix: str) -> bool:
        """Whether :meth:`product` needs the operands of a matrix."""
        return f"{matrix}.weight" in self._wanted or self._wants_bias(matrix)

    def _wants_bias(self, matrix: str) -> bool:
        # the kernels of the activation give that of an up-projection
        return f"{matrix}.bias" in self._wanted and not matrix.endswith(".up")

    def begin(self, slot: int, outputs: Tensor) -> None:
        """Begin a loop.

        Args:
            slot: of the loop in its group; loops fill them in ascending order.
            outputs: of attention, ``[group or fewer, M, D]``: the slab that its output projection multiplies.
        """
        self._slot = slot
        if self._first < 0:
            self._first = slot
        if self._group > 1:
            self._slabs["attention.out", "h"] = outputs

    def rows(self, matrix: str, operand: str, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return where an operand of this loop's :meth:`product` goes, ``[M, columns]``; None: anywhere.

        Args:
            operand: ``"dy"`` or ``"h"``.
            like: a tensor ``[M, ...]`` on its device.
        """
        if self._group == 1 or not self.wants(matrix):
            return None
        key = (matrix, operand)
        if key not in self._slabs:
            self._slabs[key] = like.new_empty((self._group, len(like), columns), dtype=dtype)
        return self._slabs[key][self._slot]

    def add(self, part: Tensor, *names: str) -> None:
        """Take partial sums ``[P, ...]`` of a parameter's gradient, or ``[P, len(names), ...]`` of those of several."""
        if not self._wanted.isdisjoint(names):
            self._parts[names] = part

    def product(self, matrix: str, dy: Tensor, h: Tensor) -> None:
        """Take this loop of ``y = h W' + b``: rows ``dy [M, N]`` and ``h [M, K]``, which are where :meth:`rows` said."""
        if self._group == 1 and self.wants(matrix):
            self._multiply(matrix, dy, h)

    def end(self, *, last: bool) -> None:
        """End a loop: add up its partial sums, and multiply the operands of its group if it is the ``last`` one there."""
        if last:
            self._flush()
        if not self._parts:
            return
        for names, part in self._parts.items():
            if names not in self._places:
                self._places[names] = (self._end, part.shape[1:])
                self._end += part.shape[1:].numel()
        offsets = [self._places[names][0] for names in self._parts]
        self._accumulate(list(self._parts.values()), self._total, offsets)
        self._parts.clear()

    def _flush(self) -> None:
        used, self._first = slice(self._first, self._slot + 1), -1
        for matrix, operand in list(self._slabs):
            if operand == "dy":
                dy, h = (self._slabs[matrix, each][used].flatten(0, 1) for each in ("dy", "h"))
                self._multiply(matrix, dy, h)
        self._slabs.pop(("attention.out", "h"), None)

    def _multiply(self, matrix: str, dy: Tensor, h: Tensor) -> None:
        if self._wants_bias(matrix):
            self.add(dy.sum(0, dtype=self._dtype)[None], f"{matrix}.bias")
        name = f"{matrix}.weight"
        if name not in self._wanted:
            return
        total = self._matrices.get(name)
        if not self._on_gpu:
            # on the CPU a product of bfloat16 rows is rounded to bfloat16 before it is added
            gradient = weight_gradient(dy, h).to(self._dtype)
            self._matrices[name] = gradient if total is None else total.add_(gradient)
        elif dy.dtype == self._dtype:
            self._matrices[name] = torch.mm(dy.t(), h) if total is None else total.addmm_(dy.t(), h)
        elif total is None:
            self._matrices[name] = torch.mm(dy.t(), h, out_dtype=self._dtype)
        else:
            torch.addmm(total, dy.t(), h, out_dtype=self._dtype, out=total)

    def finish(self) -> dict[str, Tensor]:
        """Return the sums over all loops by parameter name, without the parameters that no loop used."""
        found = dict(self._matrices)
        for names, (at, shape) in self._places.items():
            gradient = self._total[at : at + shape.numel()].view(shape)
            if names == ("conv.depthwise.weight",):
                gradient = gradient.t()[:, None]  # taps [K, C] -> [C, 1, K]
            found |= zip(names, gradient.unbind(0) if len(names) > 1 else (gradient,))
        return {name: gradient for name, gradient in found.items() if name in self._wanted}
