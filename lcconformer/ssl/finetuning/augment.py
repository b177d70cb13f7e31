"""SpecAugment (Park et al., arXiv 1904.08779) without time warping: bands of mel bins and spans of frames are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...validation import need_integer
from ..masking import utterance_rng

__all__ = ["AugmentSettings", "draw_hidden"]

_LARGEST_PART = 0.2  # of an utterance that one span may hide


@dataclass(frozen=True)
class AugmentSettings:
    """Settings of SpecAugment.

    Attributes:
        frequency_masks, frequency_width: bands per utterance, and the largest number of mel bins of a band.
        time_masks, time_width: spans per utterance, and the largest number of 10 ms frames of a span, which is never more
            than a fifth of the utterance.

    Raises:
        ValueError: a value out of range.
    """

    frequency_masks: int = 2
    frequency_width: int = 16
    time_masks: int = 2
    time_width: int = 30

    def __post_init__(self) -> None:
        for name in ("frequency_masks", "frequency_width", "time_masks", "time_width"):
            need_integer("AugmentSettings", name, getattr(self, name), 0, 1 << 16)


def draw_hidden(
    settings: AugmentSettings, utterances: Sequence[str], frames: Sequence[int], bins: int, *, seed: int, step: int
) -> Tensor:
    """Draw what a step hides: ``[B, T, C]`` bool, T the largest of ``frames``, C = ``bins``.

    A function of (seed, step, utterance id) for each utterance, whatever batch it is in.
    """
    hidden = np.zeros((len(frames), max(frames), bins), dtype=bool)
    for row, (utterance, count) in enumerate(zip(utterances, frames)):
        rng = utterance_rng(seed, step, utterance)
        for masks, width, size, axis in (
            (settings.frequency_masks, min(settings.frequency_width, bins), bins, 1),
            (settings.time_masks, min(settings.time_width, int(_LARGEST_PART * count)), count, 0),
        ):
            for _ in range(masks):
                span = int(rng.integers(width + 1))
                start = int(rng.integers(size - span + 1))
                np.moveaxis(hidden[row], axis, 0)[start : start + span] = True
    return torch.from_numpy(hidden)
