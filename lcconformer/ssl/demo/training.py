"""The demo's two trainings: from the same weights, on the same batches, with sampled depth and with fixed depth."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import Corpus
from ..model import PretrainingModel
from ..pretraining import PretrainResult, PretrainSettings, StepRecord, pretrain

__all__ = ["FIXED", "RANDOM", "SAMPLED", "TrainedModel", "train_model", "train_to_the_end"]

SAMPLED, FIXED, RANDOM = "sampled depth", "fixed depth", "random init"  # names of the three models


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, its checkpoint, and the facts about its training for ``results.json``."""

    model: PretrainingModel
    checkpoint: Path
    facts: dict[str, Any]


def train_model(
    settings: PretrainSettings, train: Corpus, test: Corpus, folder: Path, report: Callable[..., None]
) -> TrainedModel:
    """Train in ``folder``; ``report(part done, text)`` is called after each step."""
    cpu: list[float] = []  # processor time at the end of each step; the first step also warms up

    def on_step(record: StepRecord) -> None:
        cpu.append(time.process_time())
        note = f"step {record.step}/{settings.steps}  loss {record.loss:.3f}  loops {record.depths[0]}"
        report(record.step / settings.steps, note)

    result = train_to_the_end(settings, train, test, out=folder, on_step=on_step)
    history = result.history
    last = history[-max(1, len(history) // 10) :]
    facts = {
        "steps": len(history),
        "seconds": history[-1].elapsed_s,
        "cpu_seconds": cpu[-1] - cpu[0],
        "mean_depth": statistics.fmean(r.depths[0] for r in history),
        "speech_hours": sum(r.seconds for r in history) / 3600,
        "utterances_per_second": sum(r.utterances for r in history) / history[-1].elapsed_s,
        "final_loss": statistics.fmean(r.loss for r in last),
        "loss": [r.loss for r in history],
        "depth": [r.depths[0] for r in history],
        "elapsed": [r.elapsed_s for r in history],
        "held_out_loss": list(result.validation[-1][1]),
    }
    return TrainedModel(result.model, result.checkpoint, facts)


def train_to_the_end(
    settings: PretrainSettings,
    train: Corpus,
    test: Corpus | None = None,
    *,
    out: str | os.PathLike[str],
    on_step: Callable[[StepRecord], None] | None = None,
) -> PretrainResult:
    """Pretrain without a progress bar of its own.

    Raises:
        KeyboardInterrupt: the run was told to stop.  Pretraining would keep what it has; the demo cannot use half a run.
    """
    result = pretrain(settings, train, test, out=out, on_step=on_step, progress=False)
    if result.stopped != "steps":
        raise KeyboardInterrupt
    return result
