"""Random draws of a step: masks and seeds, which depend only on the seed of the run and the step."""

from __future__ import annotations

import numpy as np

from ...data import Batch, frame_count
from ..masking import Masks, draw_masks
from ..model import PretrainingModel

__all__ = ["VALIDATION", "batch_masks", "torch_seed"]

VALIDATION = (1 << 63) - 1
"""Used in place of the step for the masks and the noise of a validation."""


def torch_seed(seed: int, step: int, number: int) -> int:
    """Seed (64 bits) of torch's generator for batch ``number`` of a step."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])


def batch_masks(model: PretrainingModel, batch: Batch, seed: int, step: int) -> Masks:
    """Draw the masks of a batch with the settings of the model's objective."""
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
