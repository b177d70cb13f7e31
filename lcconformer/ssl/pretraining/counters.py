"""Counters of a run, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .settings import TrainingSettings

__all__ = ["MOST_SKIPPED", "Counters", "diverged"]

MOST_SKIPPED = 20
"""Steps in a row that may be left out; float16 loss scaling leaves out a handful to find its scale."""


@dataclass
class Counters:
    """State of a run besides its tensors; a checkpoint holds the fields under the same names.

    step: number of steps done. epoch, position: the next batches are those of step ``position`` of the epoch. skipped: number
    of steps left out because their gradient was not finite. elapsed_s: training time over all parts of the run.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0

    def progress(self, settings: TrainingSettings) -> float:
        """Part of the run (0 to 1) that is over in the middle of the coming step."""
        done = (self.step + 0.5) / settings.steps
        if settings.max_minutes is not None:
            done = max(done, self.elapsed_s / (60.0 * settings.max_minutes))
        return min(done, 1.0)

    def limit(self, settings: TrainingSettings) -> str:
        """Which limit ends the run here, ``"steps"`` or ``"minutes"``; empty if it continues."""
        if self.step >= settings.steps:
            return "steps"
        most = settings.max_minutes
        return "minutes" if most is not None and self.elapsed_s >= 60.0 * most else ""


def diverged(step: int, in_a_row: int, settings: TrainingSettings, newest: Path | None) -> ValueError:
    """Return the error of a run whose gradient was not finite in too many steps in a row, up to ``step``."""
    return ValueError(
        f"the gradient was not finite in {in_a_row} steps in a row, up to step {step}: lower learning_rate "
        f"({settings.learning_rate:g}) or raise warmup ({settings.warmup:g}); the last good checkpoint is {newest}"
    )
