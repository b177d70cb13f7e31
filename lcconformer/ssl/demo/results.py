"""The content of ``results.json``, made from the measurements of the demo."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ...config import ConformerConfig
from ...data import Corpus
from ...encoder import ConformerEncoder
from ..evaluation.classifiers import PROBES
from ..evaluation.consistency import summarise
from ..evaluation.output import describe_machine
from ..evaluation.probes import TOLERANCE, accuracies, smallest_depth
from .measurements import Measurements
from .plan import DemoPlan
from .training import FIXED, SAMPLED

__all__ = ["make_results"]


def make_results(
    plan: DemoPlan, train: Corpus, test: Corpus, training: dict[str, dict[str, Any]], measured: Measurements
) -> dict[str, Any]:
    """Make the content of ``results.json``, without the time that the demo took.

    Args:
        plan: the plan that was followed.
        train, test: the speech.
        training: facts about both trainings, by name of the model.
        measured: measurements of all three models.
    """
    settings, times, rows = plan.settings, measured.times, measured.probe_rows
    batch = dataclasses.asdict(times[SAMPLED])
    del batch["seconds"]
    return {
        "parameters": _parameters(settings.config),
        "training": training,
        "saving": _saving(training, settings.config.num_layers),
        "consistency": {
            name: {"summary": summarise(m), **{k: v.tolist() for k, v in m.items()}}
            for name, m in measured.consistency.items()
        },
        "inference": {
            "batch": batch,
            "ms_per_second": {
                name: {str(k): 1e3 * s / batch["audio_seconds"] for k, s in t.seconds.items()}
                for name, t in times.items()
            },
        },
        "probe": None if rows is None else {"rows": rows, "settings": dataclasses.asdict(plan.probe)},
        "smallest_depth": None if rows is None else _choose(rows, times[SAMPLED].seconds),
        "setup": {
            "config": json.loads(settings.config.to_json()),
            "objective": dataclasses.asdict(settings.objective),
            "training": settings.describe(),
            "train": _describe(train),
            "test": _describe(test),
            "machine": describe_machine(),
        },
    }


def _parameters(config: ConformerConfig) -> dict[str, Any]:
    """Parameters of the encoder with and without sharing, counted on both, and their ratio by formula (N P + O) / (P + O)."""
    shared = ConformerEncoder(config)
    summary = shared.summary()
    unshared = sum(p.numel() for p in ConformerEncoder(config.replace(sharing="none")).parameters())
    other = summary.unique - summary.per_layer
    return {
        "shared": summary.unique,
        "unshared": unshared,
        "ratio": unshared / summary.unique,
        "per_layer": summary.per_layer,
        "other": other,
        "formula": (config.num_layers * summary.per_layer + other) / (summary.per_layer + other),
    }


def _saving(training: dict[str, dict[str, Any]], n: int) -> dict[str, float]:
    sampled, fixed = training[SAMPLED], training[FIXED]
    return {
        "time_saved": 1.0 - sampled["seconds"] / fixed["seconds"],
        "throughput_ratio": fixed["seconds"] / sampled["seconds"],
        "cpu_time_saved": 1.0 - sampled["cpu_seconds"] / fixed["cpu_seconds"],
        "loops_saved": 1.0 - sampled["mean_depth"] / fixed["mean_depth"],
        "loops_saved_expected": 1.0 - (n + 1) / (2 * n),
    }


def _choose(rows: list[dict[str, Any]], seconds: dict[int, float]) -> dict[str, Any]:
    """For each probe, the smallest depth of the sampled model near its best one by validation, and the time that saves."""
    full = max(seconds)
    chosen: dict[str, Any] = {"tolerance": TOLERANCE, "kind": "relative"}
    for probe in PROBES:
        depth = smallest_depth(accuracies(rows, SAMPLED, probe, "validation"))
        chosen[probe] = {
            "depth": depth,
            "time_saved": 1.0 - seconds[depth] / seconds[full],
            "throughput_ratio": seconds[full] / seconds[depth],
        }
    return chosen


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "corpus": Path(corpus.name).name,
        "path": corpus.name,
        "utterances": len(corpus),
        "minutes": 60 * corpus.hours,
        "speakers": len(corpus.speakers),
        "skipped": len(corpus.skipped),
    }
