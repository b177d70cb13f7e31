"""The batches of each optimizer step on one rank."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from typing import Any

from ...data import Batch, BatchLoader, Corpus
from .counters import Counters
from .distributed import Ranks
from .settings import PretrainSettings

__all__ = ["StepFeed", "validation_loader"]


class StepFeed:
    """Training batches of this rank, ``settings.accumulate`` of them per step.

    Raises:
        ValueError: the corpus has too little speech for a step, or an utterance does not fit into a batch.
    """

    def __init__(self, train: Corpus, settings: PretrainSettings, ranks: Ranks) -> None:
        self._accumulate = settings.accumulate
        self._loader = BatchLoader(
            train,
            seed=settings.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=settings.workers,
            **_sizes(settings),
        )
        batches = self._loader.steps(0)
        if batches < settings.accumulate:
            raise ValueError(
                f"{train.name} makes {batches} batches a rank, fewer than accumulate = {settings.accumulate}: "
                "lower accumulate or batch_seconds"
            )

    def steps(self, counters: Counters) -> Generator[list[Batch], None, None]:
        """Iterate over the batches of the coming steps, starting at ``counters`` and advancing its epoch and position."""
        while True:
            batches = self._loader.epoch(counters.epoch, start=counters.position * self._accumulate)
            for _ in range(counters.position, self._loader.steps(counters.epoch) // self._accumulate):
                step = list(islice(batches, self._accumulate))
                counters.position += 1
                yield step
            counters.epoch, counters.position = counters.epoch + 1, 0


def validation_loader(validation: Corpus, settings: PretrainSettings) -> BatchLoader:
    """Batches of all held-out speech, in a fixed order."""
    return BatchLoader(validation, shuffle=False, **_sizes(settings))


def _sizes(settings: PretrainSettings) -> dict[str, Any]:
    crop = settings.crop_seconds and min(settings.crop_seconds, settings.batch_seconds)
    return {"max_seconds": settings.batch_seconds, "crop_seconds": crop}
