"""Packed batches: the frames of all utterances behind one another, ``[total, C]``, and where each one begins."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops.checks import check_lengths, check_shape, check_tensor, frame_mask, readable

__all__ = ["Layout", "Packing", "check_packed", "longest_utterance", "pack", "padded", "unpack"]


class Layout(NamedTuple):
    """Where the frames of a packed batch stand in a tensor ``[batch, frames, C]``, which is zero elsewhere.

    Attributes:
        rows: ``[total]`` int64 row of each frame, counted through the batch.
        batch, frames: sizes of that tensor.
        lengths: ``[batch]`` its real frames, or None.
    """

    rows: Tensor
    batch: int
    frames: int
    lengths: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """``[total, ...] -> [batch, frames, ...]``."""
        rest = x.shape[1:]
        return (
            x.new_zeros(self.batch * self.frames, *rest)
            .index_copy_(0, self.rows, x)
            .view(self.batch, self.frames, *rest)
        )

    def collect(self, y: Tensor) -> Tensor:
        """``[batch, frames, ...] -> [total, ...]``."""
        return y.flatten(0, 1).index_select(0, self.rows)


@dataclass(frozen=True)
class Packing:
    """A packed batch without its frames: what the loops get in the place of lengths, for ``x [1, total, d_model]``.

    Attributes:
        cu_seqlens: ``[B+1]`` int32 or int64; utterance b is the frames ``cu_seqlens[b] ... cu_seqlens[b+1]-1``.
        longest: frames of the longest utterance, or more.
        utterance: ``[total]`` int64 that each frame belongs to.
        frame: ``[total]`` int64 number of each frame in its utterance.
    """

    cu_seqlens: Tensor
    longest: int
    utterance: Tensor
    frame: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, total: int, longest: int) -> Packing:
        """Work out where ``total`` frames are."""
        row = torch.arange(total, device=cu_seqlens.device)
        utterance = torch.bucketize(row, cu_seqlens[1:], right=True)
        return cls(cu_seqlens, longest, utterance, row - cu_seqlens[utterance])

    def padded(self) -> Layout:
        """An utterance a row, ``[B, longest, C]``."""
        return Layout(
            self.utterance * self.longest + self.frame, len(self.cu_seqlens) - 1, self.longest, self.cu_seqlens.diff()
        )

    def apart(self, gap: int) -> Layout:
        """All utterances in one row with ``gap`` frames of zeros between neighbours: they are out of sight of one another
        for a convolution that reaches that far.
        """
        total, utterances = len(self.utterance), len(self.cu_seqlens) - 1
        row = torch.arange(total, device=self.utterance.device)
        return Layout(row + self.utterance * gap, 1, total + gap * max(utterances - 1, 0), None)


def padded(lengths: Tensor | Packing | None) -> Tensor | None:
    """Return the lengths of a padded batch.

    Raises:
        TypeError: the batch is packed, and whoever asks takes padded ones only.
    """
    if isinstance(lengths, Packing):
        raise TypeError("got a packed batch where only padded ones are served")
    return lengths


def check_packed(who: str, x: Tensor, width: int | None, cu_seqlens: Tensor) -> None:
    """``x`` is ``[total, width]`` in a floating dtype; ``cu_seqlens [B+1]`` rises from 0 to total, where it is readable."""
    check_tensor(who, "input", x)
    check_shape(who, "input", x, (None, width), f"[total, {width or 'C'}]")
    if not x.is_floating_point():
        raise ValueError(f"{who}: input has dtype {x.dtype}; expected a floating dtype")
    check_tensor(who, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{who}: cu_seqlens has dtype {cu_seqlens.dtype}; expected int32 or int64")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"{who}: cu_seqlens has shape {list(cu_seqlens.shape)}; expected [B+1]")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{who}: cu_seqlens is on {cu_seqlens.device} but the input is on {x.device}; move it there")
    if readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != len(x) or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"{who}: cu_seqlens is {ends}; expected numbers that rise from 0 to total = {len(x)}")


def longest_utterance(who: str, cu_seqlens: Tensor, longest: int | None) -> int:
    """Return ``longest``, checked where ``cu_seqlens [B+1]`` is readable; None: read it there, which waits for a GPU."""
    if longest is not None and (not isinstance(longest, int) or isinstance(longest, bool) or longest < 0):
        raise ValueError(f"{who}: longest is {longest!r}; expected the frames of the longest utterance, or None")
    if longest is None or readable(cu_seqlens):
        found = max((b - a for a, b in pairwise(cu_seqlens.tolist())), default=0)
        if longest is None:
            return found
        if longest < found:
            raise ValueError(f"{who}: longest is {longest}, but an utterance has {found} frames")
    return longest


def pack(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Put the real frames of a padded batch behind one another.  On a GPU this waits for the device.

    Args:
        x: ``[B, T, C]``.
        lengths: ``[B]`` int64 or int32 real frames, 0 ... T.

    Returns:
        ``(packed [total, C], cu_seqlens [B+1] int32)``; differentiable in ``x``.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit.
    """
    check_shape("pack", "x", x, (None, None, None), "[B, T, C]")
    check_tensor("pack", "lengths", lengths)
    check_lengths("pack", lengths, x.shape[0], x.shape[1], x.device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return x[frame_mask(lengths, x.shape[1])], cu_seqlens


def unpack(packed: Tensor, cu_seqlens: Tensor, longest: int | None = None) -> Tensor:
    """Return a packed batch as a padded one, with zeros in the padding; the inverse of :func:`pack`.

    Args:
        packed: ``[total, C]``.
        cu_seqlens: ``[B+1]`` int32 or int64; utterance b is the frames ``cu_seqlens[b] ... cu_seqlens[b+1]-1``.
        longest: T of the result, at least the frames of the longest utterance; None: as many, for which a GPU is waited for.

    Returns:
        ``[B, T, C]``; its lengths are ``cu_seqlens.diff()``.  Differentiable in ``packed``.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    check_packed("unpack", packed, None, cu_seqlens)
    longest = longest_utterance("unpack", cu_seqlens, longest)
    return Packing.of(cu_seqlens, len(packed), longest).padded().spread(packed)
