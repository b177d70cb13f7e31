"""Masks: which frames the encoder must predict, and what it is shown in their place.

Spans are drawn on the host, for each utterance from its own counter-based generator, keyed by (seed, step, utterance id).
So an utterance's mask does not depend on its batch, its rank or the process that draws it, nor on whether the run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Masks", "draw_masks", "utterance_rng"]

# parts of the utterances whose masked frames are zeroed or replaced; the others keep theirs (as in BERT, but drawn per
# utterance, as in S3PRL's Mockingjay)
ZERO, REPLACE = 0.8, 0.1


@dataclass(frozen=True)
class Masks:
    """Masks of a batch of B utterances with T input frames and T' encoder outputs.

    chosen: ``[B, T]`` bool, frames to predict. hidden: ``[B, T]`` bool, frames that the encoder does not see. source:
    ``[B, T]`` int64, index of the frame shown at each position: its own unless replaced. outputs: ``[n]`` int64, encoder
    outputs ``b * T' + t'`` that cover a chosen frame. num_chosen: number of chosen frames, on the host.
    """

    chosen: Tensor
    hidden: Tensor
    source: Tensor
    outputs: Tensor
    num_chosen: int

    def to(self, device: torch.device | str) -> Masks:
        chosen, hidden, source, outputs = (
            x.to(device, non_blocking=True) for x in (self.chosen, self.hidden, self.source, self.outputs)
        )
        return Masks(chosen, hidden, source, outputs, self.num_chosen)


def utterance_rng(seed: int, step: int, utterance: str) -> np.random.Generator:
    """An independent Philox stream (Salmon et al. 2011) for each (seed, step, utterance)."""
    word = int.from_bytes(hashlib.blake2b(utterance.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, word], dtype=np.uint64)))


def draw_masks(
    utterances: Sequence[str],
    frames: Sequence[int],
    *,
    seed: int,
    step: int,
    fraction: float,
    span: int,
    factor: int = 1,
    bert: bool = True,
) -> Masks:
    """Draw ``round(frames * fraction / span)`` spans of ``span`` frames in each utterance, but at least one.

    Spans start at different frames but may overlap, so that a little less than ``fraction`` of the frames is chosen (as in
    S3PRL's Mockingjay): with 15%, 13.9% of a long utterance.

    Args:
        utterances: B ids.
        frames: number of frames of each of the B utterances without padding, 1 or more.
        seed, step: key of the draw, 0 or more.
        fraction: part of the frames to choose, in (0, 1).
        span: length of a span in frames, 1 or more.
        factor: number of input frames per encoder output.
        bert: True: spans start at any frame; they are zeroed in 80% of the utterances, replaced by other frames of the same
            utterance in 10%, and left as they are in 10%.  False: all spans are hidden, and consist of whole encoder outputs.

    Raises:
        ValueError: a value out of range.
    """
    if len(utterances) != len(frames) or not frames or min(frames) < 1:
        raise ValueError(
            f"draw_masks: {len(utterances)} utterances with frames {list(frames)}; expected 1 or more each"
        )
    if not 0.0 < fraction < 1.0 or span < 1 or factor < 1:
        raise ValueError(
            f"draw_masks: fraction {fraction}, span {span}, factor {factor}; expected 0 < fraction < 1, others 1 or more"
        )
    if seed < 0 or step < 0:
        raise ValueError(f"draw_masks: seed {seed}, step {step}; expected 0 or more")
    longest = max(frames)
    steps = -(-longest // factor)
    shape = (len(frames), longest)
    chosen, hidden = np.zeros((len(frames), steps * factor), dtype=bool), np.zeros(shape, dtype=bool)
    source = np.broadcast_to(np.arange(longest), shape).copy()
    grid = 1 if bert else factor
    for row, (utterance, count) in enumerate(zip(utterances, frames)):
        rng = utterance_rng(seed, step, utterance)
        units = -(-count // grid)  # places where a span may start
        width = min(max(1, round(span / grid)), units)
        places = units - width + 1
        spans = min(max(1, round(count * fraction / span)), places)
        starts = rng.choice(places, spans, replace=False)
        for start in starts * grid:
            chosen[row, start : min(start + width * grid, count)] = True
        picked = chosen[row, :longest]
        die = rng.random() if bert else 0.0
        if die < ZERO:
            hidden[row] = picked
        elif die < ZERO + REPLACE:
            # one shift per utterance: spans are replaced by contiguous speech, and no frame by itself
            shift = int(rng.integers(1, count)) if count > 1 else 0
            source[row, picked] = (source[row, picked] + shift) % count
    outputs = np.flatnonzero(chosen.reshape(-1, factor).any(1))
    chosen = chosen[:, :longest]
    return Masks(
        chosen=torch.from_numpy(np.ascontiguousarray(chosen)),
        hidden=torch.from_numpy(hidden),
        source=torch.from_numpy(source),
        outputs=torch.from_numpy(outputs),
        num_chosen=int(chosen.sum()),
    )
