"""Measurements of the demo's three models: consistency of the depths, inference time, phone probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data import Corpus
from ..evaluation import DepthTimes, model_consistency, probe_model, split_validation, time_depths
from ..model import PretrainingModel
from .plan import DemoPlan
from .stages import Stages
from .training import SAMPLED

__all__ = ["STAGES", "Measurements", "measure"]

# stages and how long each takes, in units of the fixed-depth training
STAGES = {"consistency": 0.1, "inference time": 0.1, "probes": 0.8}


@dataclass(frozen=True)
class Measurements:
    """Measurements by name of the model.

    consistency: the matrices of :func:`~lcconformer.ssl.evaluation.model_consistency`. times: of the encoder at depth 1 ... N.
    probe_rows: those of :func:`~lcconformer.ssl.evaluation.probe_model` for all models, with ``ms_per_second``, the inference
    time per second of speech, at depth 1 ... N; None for speech without phone alignments.
    """

    consistency: dict[str, dict[str, np.ndarray]]
    times: dict[str, DepthTimes]
    probe_rows: list[dict[str, Any]] | None


def measure(
    models: Mapping[str, PretrainingModel], train: Corpus, test: Corpus, plan: DemoPlan, stages: Stages, probes: bool
) -> Measurements:
    """Measure all models on ``test``; ``probes``, which train on ``train``, need phone alignments."""
    depths = list(range(plan.settings.config.num_layers + 1))
    matrices = {}
    with stages.stage("consistency") as report:
        for number, (name, model) in enumerate(models.items(), 1):
            matrices[name] = model_consistency(model, test, max_frames=plan.consistency_frames, seed=plan.settings.seed)
            report(number / len(models))
    with stages.stage("inference time"):
        times = time_depths(models, test, depths[1:], rounds=plan.rounds)
    if not probes:
        return Measurements(matrices, times, None)
    rows = _probe(models, train, test, plan, stages)
    for row in rows:
        if row["features"] in models and row["depth"]:
            seconds = times[row["features"]].seconds[row["depth"]]
            row["ms_per_second"] = 1e3 * seconds / times[SAMPLED].audio_seconds
    return Measurements(matrices, times, rows)


def _probe(
    models: Mapping[str, PretrainingModel], train: Corpus, test: Corpus, plan: DemoPlan, stages: Stages
) -> list[dict[str, Any]]:
    depths = list(range(plan.settings.config.num_layers + 1))
    rows: list[dict[str, Any]] = []
    train, validation = split_validation(train, seed=plan.settings.seed)
    with stages.stage("probes") as report:
        for number, (name, model) in enumerate(models.items()):

            def part_done(part: float, before: int = number) -> None:
                report((before + part) / len(models))

            rows += probe_model(
                model,
                train,
                validation,
                test,
                depths,
                settings=plan.probe,
                name=name,
                log_mel=number == 0,
                progress=part_done,
            )
    return rows
