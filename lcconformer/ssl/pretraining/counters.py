"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """Everything about a run that changes from step to step, besides tensors; a checkpoint holds it under these names.

    step: steps done. epoch, position: the next batches are those of step ``position`` of the epoch. skipped: steps left out
    because their gradient was not finite. elapsed_s: seconds of training, over all parts of the run.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
