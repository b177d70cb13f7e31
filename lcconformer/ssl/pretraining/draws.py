"""Everything random in a step: masks and seeds, as functions of the run's seed and the step."""

from __future__ import annotations

import numpy as np

from ...data import Batch, frame_count
from ..masking import Masks, draw_masks
from ..model import PretrainingModel

__all__ = ["VALIDATION", "batch_masks", "torch_seed"]

VALIDATION = (1 << 63) - 1
"""Stands for the step in the masks and noise of a validation."""


def torch_seed(seed: int, step: int, number: int) -> int:
    """64-bit seed of torch's generator for batch ``number`` of a step."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])


def batch_masks(model: PretrainingModel, batch: Batch, seed: int, step: int) -> Masks:
    """Masks of a batch, as the model's objective wants them."""
    objective = model.objective_settings
    return draw_masks(
        batch.ids,
        frame_count(batch.lengths).tolist(),
        seed=seed,
        step=step,
        fraction=objective.fraction,
        span=objective.span,
        factor=model.config.subsampling_factor,
        bert=model.objective.bert,
    )
