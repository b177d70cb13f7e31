"""Blocks: how the layers see an utterance in pieces, with the past in reach and a bounded view of the future."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import Packing
from .positions import apply_rotary

__all__ = ["Blocks", "Chunking", "Lengths", "Neighbours", "Past", "Remembered", "position_frames"]


class Chunking(NamedTuple):
    """Frames, at the layers, of a chunk, of the attention before it and of what it sees after it; and of the convolution's
    reach to either side.
    """

    chunk: int
    left: int
    right: int
    reach: int

    @property
    def block(self) -> int:
        """Frames of a block, those of a chunk and of what it sees after them."""
        return self.chunk + self.right


class Past(NamedTuple):
    """What one loop remembers of the frames before a block.

    Attributes:
        keys, values: ``[B, left, H, D]``, without rotation.
        convolution: ``[B, K // 2, 2 d_model]`` values and gates; zeros before the utterance.
    """

    keys: Tensor
    values: Tensor
    convolution: Tensor


class Blocks:
    """Blocks ``[B, Q, d_model]``: what a layer gets in the place of lengths.

    A frame of a block attends to ``left`` frames before the block and to the whole block; the convolution sees
    the frames before the block too, and zeros behind it.

    Args:
        chunking: sizes.
        lengths: ``[B]`` real frames of each block, 0 ... Q.
        seen: ``[B]`` frames of the utterance before it.
    """

    def __init__(self, chunking: Chunking, lengths: Tensor, seen: Tensor) -> None:
        self.chunking, self.lengths, self._seen = chunking, lengths, seen

    def before(self, name: str, x: Tensor) -> Tensor:
        """Return the frames ``[B, n, ...]`` before those of ``x [B, Q, ...]``, which is the field ``name`` of the past."""
        raise NotImplementedError

    def window(self, x: Tensor) -> Tensor:
        """Return ``[B, left + Q, C]`` in the place of ``x [B, Q, C]``: the frames that positions are needed for."""
        return x[:, :1].expand(-1, self.chunking.left + self.chunking.block, -1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        relative: tuple[Tensor, Tensor, Tensor] | None,
        rotary: tuple[Tensor, Tensor] | None,
        dropout_p: float,
    ) -> Tensor:
        """Attention of a block to itself and the frames before it, ``[B, Q, H, D] -> [B, Q, H, D]``.

        Args:
            q, k, v: without rotation.
            relative: pos ``[2W-1, H, D]`` of positions W-1 ... -(W-1), W = left + Q, with u and v_bias ``[H, D]``.
            rotary: tables ``[W, D]``.
        """
        left, block = self.chunking.left, self.chunking.block
        k = torch.cat((self.before("keys", k), k), 1)  # [B, W, H, D]
        v = torch.cat((self.before("values", v), v), 1)
        if rotary is not None:
            # only differences of angles count
            cos, sin = (t.to(q.dtype) for t in rotary)
            q, k = apply_rotary(q, cos[left:], sin[left:]), apply_rotary(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, Q or W, D]
        if relative is None:
            scores = q @ k.transpose(-1, -2)  # [B, H, Q, W]
        else:
            pos, u, v_bias = relative
            positions = (q + v_bias[:, None]) @ pos[: left + 2 * block - 1].permute(1, 2, 0)  # [B, H, Q, left + 2Q - 1]
            scores = (q + u[:, None]) @ k.transpose(-1, -2) + _shift(positions, left + block)
        key = torch.arange(left + block, device=q.device)
        real = (key >= left - self._seen[:, None]) & (key < left + self.lengths[:, None])  # [B, W]
        scores = (scores * (1.0 / math.sqrt(q.shape[-1]))).masked_fill(
            ~real[:, None, None], torch.finfo(scores.dtype).min
        )
        return (F.dropout(scores.softmax(-1), dropout_p) @ v).transpose(1, 2)

    def extend(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Put what the convolution sees before a block ahead of it: ``[B, Q, 2 d_model] -> [B, K // 2 + Q, 2 d_model]``;
        and its lengths.
        """
        return torch.cat((self.before("convolution", y), y), 1), self.lengths + self.chunking.reach


# what a layer is told of its input: lengths [B] or None of a padded batch, or what is known of a packed one, or of blocks
Lengths = Tensor | Packing | Blocks | None


def position_frames(x: Tensor, lengths: Lengths) -> Tensor:
    """Return ``[B, T, C]`` in the place of ``x``, with as many frames as positions are needed for."""
    if isinstance(lengths, Blocks):
        return lengths.window(x)
    return x[:, : lengths.longest] if isinstance(lengths, Packing) else x


def _shift(x: Tensor, window: int) -> Tensor:
    """``[..., Q, P] -> [..., Q, window]`` with ``out[i, j] = x[i, Q-1-i+j]``."""
    *lead, q, p = x.shape
    return F.pad(x, (1, 0)).flatten(-2)[..., q:].reshape(*lead, q, p)[..., :window]


class Remembered(Blocks):
    """The next block of each stream; the past is what earlier calls left behind.

    Args:
        past: of the loop.
    """

    def __init__(self, chunking: Chunking, lengths: Tensor, seen: Tensor, past: Past) -> None:
        super().__init__(chunking, lengths, seen)
        self.past = past

    def before(self, name: str, x: Tensor) -> Tensor:
        past: Tensor = getattr(self.past, name)
        joined = torch.cat((past, x[:, : self.chunking.chunk].to(past.dtype)), 1)
        goes_on = (self.lengths > 0).view(-1, *(1,) * (past.dim() - 1))
        self.past = self.past._replace(
            **{name: torch.where(goes_on, joined[:, joined.shape[1] - past.shape[1] :], past)}
        )
        return past.to(x.dtype)


class Neighbours(Blocks):
    """All blocks of all utterances at once, ``[B * n, Q, d_model]``; the past is in the chunks before.

    Args:
        lengths: ``[B]`` real frames of each utterance.
        count: n, blocks of an utterance.
    """

    def __init__(self, chunking: Chunking, lengths: Tensor, count: int) -> None:
        start = torch.arange(count, device=lengths.device) * chunking.chunk
        rest = (lengths[:, None] - start).clamp(0, chunking.block)  # [B, n]
        super().__init__(chunking, rest.flatten(), start.expand(rest.shape).flatten())
        self._count = count

    def before(self, name: str, x: Tensor) -> Tensor:
        chunk, _, _, reach = self.chunking
        n = reach if name == "convolution" else self.chunking.left
        if n == 0:
            return x[:, :0]
        chunks = x[:, :chunk].unflatten(0, (-1, self._count)).flatten(1, 2)  # [B, n * chunk, ...]
        joined = torch.cat((chunks.new_zeros(chunks.shape[0], n, *chunks.shape[2:]), chunks), 1)
        return joined.unfold(1, n, chunk)[:, : self._count].movedim(-1, 2).flatten(0, 1)
