"""Position encodings: sinusoids of relative positions (Transformer-XL), rotations (RoFormer)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apply_rotary", "relative_sinusoids", "rotary_tables"]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    # angles of late frames need more than half precision
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_sinusoids(frames: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoids ``[2T-1, width]`` of the relative positions T-1 ... -(T-1), for T = ``frames``.

    Columns are sin and cos in turn, at the rates 10000^(-2k/width).  Without frames there are no rows.
    """
    if frames == 0:
        return torch.empty(0, width, device=device, dtype=dtype)
    work = _work_dtype(dtype)
    position = torch.arange(frames - 1, -frames, -1, device=device).to(work)
    rate = torch.exp(torch.arange(0, width, 2, device=device).to(work) * (-math.log(10000.0) / width))
    angle = position[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(dtype)


def rotary_tables(frames: int, width: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables ``cos``, ``sin`` ``[T, width]`` for :func:`apply_rotary` (Su et al. 2021); both column halves are equal."""
    work = _work_dtype(dtype)
    rate = 10000.0 ** (-torch.arange(0, width, 2, device=device).to(work) / width)
    angle = torch.arange(frames, device=device).to(work)[:, None] * rate  # [T, width / 2]
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, T, H, D]`` by the angles of :func:`rotary_tables` of width D."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
