"""The rule that decides whether numbers are right, for tests, benchmarks and the doctor alike.

``ref`` is computed in float64, ``low`` by plain PyTorch in the dtype of the tensor under test, ``out``. ``out`` is right if ::

    max|out - ref|  <=  r * max|low - ref|  +  2 * eps * scale

with r = 2 for outputs and r = 3 for gradients. ``eps`` is that of the dtype and ``scale`` the largest value, so the last term
is two roundings: it matters where ``low`` happens to be exact. Errors that are not finite never pass, on either side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["GRADIENT_FACTOR", "OUTPUT_FACTOR", "allowed_error", "largest_error", "passes", "relative_error"]

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def largest_error(out: Tensor, ref: Tensor) -> float:
    """``max|out - ref|`` in float64; infinite if a difference is NaN or infinite, 0 for tensors without elements."""
    if not out.numel():
        return 0.0
    error = (out.double() - ref).abs().max().item()
    return error if math.isfinite(error) else math.inf


def relative_error(out: Tensor, ref: Tensor) -> float:
    """:func:`largest_error` over the largest value of ``ref``."""
    if not ref.numel():
        return 0.0
    return largest_error(out, ref) / max(ref.abs().max().item(), torch.finfo(torch.float64).tiny)


def allowed_error(low: float, factor: float, dtype: torch.dtype, scale: float = 1.0) -> float:
    """The right-hand side of the rule.

    Args:
        low: the error of plain PyTorch, absolute or relative.
        factor: :data:`OUTPUT_FACTOR` or :data:`GRADIENT_FACTOR`.
        dtype: floating-point dtype of the tensor under test.
        scale: the largest value of the reference; 1 for relative errors.
    """
    return factor * low + 2 * torch.finfo(dtype).eps * scale


def passes(error: float, allowed: float) -> bool:
    """Whether an error is within what is allowed; never if one of them is NaN or infinite."""
    return error <= allowed < math.inf
