"""Arguments of relpos_attention, and what a backend does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Contract

__all__ = ["MAX_HEAD_DIM", "Backend", "RelposAttention", "Traits"]

# a Triton program holds whole rows of a head
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class RelposAttention(Contract):
    """One call, checked.

    Attributes:
        q, k, v: ``[B, T, H, D]``, or packed ``[frames, H, D]`` with ``cu_seqlens``.
        pos: ``[2T-1, H, D]`` projected embeddings of positions T-1 ... -(T-1); None, with u and v_bias: no positions.
        u, v_bias: ``[H, D]``.
        lengths: ``[B]`` real frames, or None.
        cu_seqlens: ``[B+1]``, or None.
        seed: int64 ``[1]`` of the dropout of attention weights; None: the kernels drop nothing.
        dropout_p: probability of dropping an attention weight.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor | None
    u: Tensor | None
    v_bias: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None
    dropout_p: float

    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return pos, u and v_bias of a call with positions."""
        if self.pos is None or self.u is None or self.v_bias is None:
            raise ValueError("relpos_attention: this backend needs pos, u and v_bias; got None")
        return self.pos, self.u, self.v_bias


class Traits(NamedTuple):
    """What decides the backend: device and dtype of q, and the width D of a head."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


class Backend(Protocol):
    """The kernels of one backend."""

    def unsupported(self, traits: Traits, /) -> list[str]:
        """Return why calls with these traits cannot be served; empty: they can."""

    def forward(self, args: RelposAttention, /, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output, shaped like q, and what the backward needs of the softmax.

        The kernels return the log2-sum-exp2 of the scaled scores, float32 ``[H, frames in all]``.  The output is written
        to ``out``, which is contiguous, if that is given.
        """

    def backward(
        self, dout: Tensor, args: RelposAttention, out: Tensor, lse: Tensor, /, *, partial: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v and, with positions, of pos, u and v_bias, in their dtypes.

        Args:
            partial: return the last three as partial sums, ``[P, ...]``, whose sum over the first dimension they are.
        """
