"""Counters of a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


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
