"""The training engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lcconformer.encoder import ConformerEncoder

__all__ = ["reasons", "run"]


def reasons(encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None) -> list[str]:
    """Why this engine cannot run the loops of ``x [B, T, d_model]``; empty: it can."""
    return ["there is no training engine yet"]


def run(
    encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None, depth: int, return_hidden_states: bool
) -> list[Tensor]:
    """Outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    raise NotImplementedError
