"""Runs one by one, each in a folder of its own: what is complete is not repeated, what was interrupted goes on.

``result.json`` of a run holds what its settings, seeds and speech decide; ``times.json`` holds what the machine decides, and
which machine and commit that was.  The latter is written last: with it, the run is complete.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data import BatchLoader
from ...depth import ExitRule
from ...runtime import commit
from ..checkpoint import find_checkpoints
from ..evaluation.consistency import model_consistency
from ..evaluation.depth_timing import median_seconds, time_depths, time_front
from ..evaluation.output import describe_machine, write_json
from ..evaluation.probes import LOG_MEL, probe_model
from ..finetuning import (
    FinetuneResult,
    best_depth,
    calibrate_exit,
    error_rates,
    exit_depths,
    finetune,
    read_corpus,
)
from ..finetuning.evaluation import Reading
from ..finetuning.learner import Learner
from ..model import PretrainingModel, load_model
from ..objectives import ObjectiveSettings
from ..pretraining import PretrainResult, StepRecord, pretrain
from ..pretraining.distributed import Ranks
from .plan import Run
from .speech import NoisyCorpus, ReproductionSpeech

__all__ = ["Stopped", "execute", "is_complete"]

_CURVE = 20  # points of a learning curve
_THRESHOLDS = 16  # of the exit rule, on the curve of error against mean depth
_RATE = 1e-6  # learning rate of steps that only their time matters of


class Stopped(Exception):
    """A signal ended a training, after a checkpoint; the argument is the signal's name."""


@dataclass(frozen=True)
class _Job:
    """A run at work: on which speech, in which folder, where the runs before it are, on which device, whom it tells."""

    run: Run
    speech: ReproductionSpeech
    folder: Path
    earlier: Sequence[Path]
    device: torch.device
    report: Callable[..., None]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run by name."""
        return dict(self.run.settings)


def is_complete(out: Path, run: Run) -> bool:
    return (out / "runs" / run.folder / "times.json").is_file()


def execute(
    run: Run,
    speech: ReproductionSpeech,
    out: Path,
    ranks: Ranks,
    report: Callable[..., None],
) -> None:
    """Do a run, or the rest of it, in its folder under ``out``.

    Args:
        run: its models come from the complete runs of ``run.after``.
        speech: the speech that the plan was made for.
        ranks: the processes, all of which train; the first one measures and writes, on its device.
        report: called with the part that is done and a few words.

    Raises:
        Stopped: a signal came; what was trained is kept.
    """
    folder = out / "runs" / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(run, speech, folder, [out / "runs" / other.folder for other in run.after], ranks.device, report)
    if not ranks.first:
        _fit(job, None)
        return
    result, times = _KINDS[run.kind](job)
    write_json(folder / "result.json", {"description": run.description, **result})
    where = {"machine": describe_machine(ranks.device), "processes": ranks.world_size, "commit": commit()}
    write_json(folder / "times.json", times | where)


def _fit(job: _Job, start: PretrainingModel | None) -> PretrainResult | FinetuneResult:
    """Train or go on, to the last step.

    Raises:
        Stopped: a signal came.
    """
    settings, speech = job.settings["training"], job.speech

    def on_step(record: StepRecord) -> None:
        note = f"step {record.step}/{settings.steps}  loss {record.loss:.3f}  loops {record.depths[0]}"
        job.report(0.9 * record.step / settings.steps, note)

    options: dict[str, Any] = {"out": job.folder / "training", "resume": True, "on_step": on_step, "progress": False}
    done: PretrainResult | FinetuneResult
    if job.run.kind == "pretrain":
        done = pretrain(settings, speech.pretraining, speech.validation, **options)
    else:
        done = finetune(settings, speech.train, speech.validation, start=start, **options)
    if done.stopped != "steps":
        raise Stopped(done.stopped)
    return done


def _train(job: _Job, start: PretrainingModel | None) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Train or go on; returns the model, and the result and the times of the training."""
    settings, place = job.settings["training"], job.folder / "training"
    done = _fit(job, start)
    with open(place / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    compute = [float(row["compute_s"]) for row in rows]
    depths = [int(row["depths"].partition("+")[0]) for row in rows]
    ends = sorted({max(1, round(len(rows) * i / _CURVE)) for i in range(1, _CURVE + 1)})
    starts = [0, *ends]
    losses = [statistics.fmean(float(r["loss"]) for r in rows[a:b]) for a, b in zip(starts, ends)]
    with open(place / "validation.csv", newline="") as file:
        validation = [float(row["loss"]) for row in csv.DictReader(file) if int(row["step"]) == settings.steps]
    summary = done.model.encoder.summary()
    encoder = done.model.encoder.config
    result = {
        "training": {
            "steps": len(rows),
            "loops": sum(depths),
            "loops_per_step": statistics.fmean(depths),
            "speech_hours": sum(float(row["seconds"]) for row in rows) / 3600,
            "curve": {"step": ends, "loss": losses},
            "validation_loss": validation,
        },
        "encoder": {
            "num_layers": encoder.num_layers,
            "d_model": encoder.d_model,
            "unique": summary.unique,
            "effective": summary.effective,
            "heads": sum(p.numel() for p in done.model.parameters()) - summary.unique,
            "gflops": [f / 1e9 for f in summary.flops],
        },
    }
    # by the clock, whatever else the machine did
    times = {"training": {"compute_s": sum(compute), "step_s": statistics.median(compute)}}
    return done.model.eval(), result, times


Done = tuple[dict[str, Any], dict[str, Any]]


def _pretrain(job: _Job) -> Done:
    _, result, times = _train(job, None)
    return result, times


def _finetune(job: _Job) -> Done:
    trained, speech = bool(find_checkpoints(job.folder / "training")), job.speech
    start = load_model(job.earlier[0] / "training") if job.earlier and not trained else None
    model, result, times = _train(job, start)
    job.report(0.9, "measuring")
    readings = {
        "validation": read_corpus(model, speech.validation),
        "test": read_corpus(model, speech.test),
        "noisy": read_corpus(model, NoisyCorpus(speech.test)),
    }
    depths = range(1, model.config.num_layers + 1)
    rows = {name: [{"depth": k, **error_rates(read, k)} for k in depths] for name, read in readings.items()}
    chosen = best_depth(rows["validation"])
    frames = job.settings["consistency_frames"]
    matrices = model_consistency(model, speech.validation, max_frames=frames, seed=job.run.seed)
    measured = {
        "rows": rows,
        "by_speaker": _by_speaker(readings["test"], speech.speakers),
        "chosen_depth": chosen,
        "exit": _exit(readings, chosen, "change"),
        "exit_entropy": _exit(readings, chosen, "entropy"),
        "exit_curve": _exit_curve(readings, chosen),
        "consistency": {name: matrix.tolist() for name, matrix in matrices.items()},
    }
    return result | measured, times


def _by_speaker(readings: Sequence[Reading], speakers: dict[str, str]) -> dict[str, list[dict[str, list[int]]]]:
    """For each speaker and depth, the numbers of errors and of what they are over: frames, phones, characters."""
    parts: dict[str, list[Reading]] = {}
    for reading in readings:
        parts.setdefault(speakers[reading.id], []).append(reading)
    depths = range(1, len(readings[0].changes) + 1)
    return {who: [_counts(error_rates(part, k)) for k in depths] for who, part in sorted(parts.items())}


def _counts(rates: dict[str, Any]) -> dict[str, list[int]]:
    found = {}
    for name, over in (("per", "phones"), ("cer", "characters"), ("wer", "words")):
        if name in rates:
            found[name] = [round(rates[name] * rates[over]), rates[over]]
    if "frame_accuracy" in rates:
        total = rates["frames"]
        found["frame_error"] = [total - round(rates["frame_accuracy"] * total), total]
    return found


def _exit(readings: dict[str, list[Reading]], depth: int, kind: str) -> dict[str, Any]:
    """An exit rule that the validation speech calibrates, and the errors with it."""
    rule = calibrate_exit(readings["validation"], depth, kind)
    at = {name: error_rates(readings[name], exit_depths(readings[name], rule)) for name in ("test", "noisy")}
    return {"rule": dataclasses.asdict(rule), **at}


def _exit_curve(readings: dict[str, list[Reading]], depth: int) -> list[dict[str, Any]]:
    """Error and mean depth for thresholds of the exit rule that the validation speech spreads."""
    changes = torch.tensor([c for r in readings["validation"] for c in r.changes[: depth - 1] if c > 0])
    if not len(changes):
        return []
    rows = []
    for threshold in changes.quantile(torch.linspace(1.0, 0.0, _THRESHOLDS)).unique().flip(0).tolist():
        rule = ExitRule("change", depth=depth, threshold=threshold)
        at = {name: error_rates(readings[name], exit_depths(readings[name], rule)) for name in ("test", "noisy")}
        rows.append({"threshold": threshold, **at})
    return rows


def _probe(job: _Job) -> Done:
    own, speech = job.settings, job.speech
    if job.earlier:
        model = load_model(job.earlier[0] / "training", job.device)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(job.run.seed)
            model = PretrainingModel(own["encoder"], own["features"], ObjectiveSettings()).to(job.device).eval()
    rows = probe_model(
        model,
        speech.train,
        speech.validation,
        speech.test,
        range(1, model.config.num_layers + 1),
        settings=own["probe"],
        name=job.run.model,
        log_mel=not job.earlier,
        progress=job.report,
    )
    frames = min(8192, own["probe"].max_frames)
    matrices = model_consistency(model, speech.validation, max_frames=frames, seed=job.run.seed)
    return {
        "rows": [row for row in rows if row["features"] != LOG_MEL],
        "log_mel": [row for row in rows if row["features"] == LOG_MEL],
        "consistency": {name: matrix.tolist() for name, matrix in matrices.items()},
    }, {}


def _timing(job: _Job) -> Done:
    """Times of models with random weights: they depend on the sizes alone, and no checkpoint has to be there."""
    rounds, speech = job.settings["rounds"], job.speech
    trainings = {name: settings for name, settings in job.settings.items() if name != "rounds"}
    learners = {name: (own, Learner(own, speech.train, None, job.device, None)) for name, own in trainings.items()}
    models = {name: learner.model.eval() for name, (_, learner) in learners.items()}
    front = time_front(models, speech.test, rounds=rounds)
    job.report(0.1, "inference")
    times = {}
    depths = range(1, max(model.config.num_layers for model in models.values()) + 1)
    measured = time_depths(models, speech.test, depths, rounds=rounds)
    for name, value in measured.items():
        times[name] = {"depth_s": {str(k): s for k, s in value.seconds.items()}, **front[name]}
        facts = {k: v for k, v in dataclasses.asdict(value).items() if k != "seconds"}
    job.report(0.4, "training steps")
    steps = _time_steps(learners, speech, rounds)
    return {"models": list(models)}, {"inference": times, "batch": facts, "step_s": steps}


def _time_steps(
    learners: dict[str, tuple[Any, Learner]],
    speech: ReproductionSpeech,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Median time of a training step of each model at each of its depths, all models and depths in turn in every round."""
    first = next(iter(learners.values()))[0]
    loader = BatchLoader(speech.train, seed=0, max_seconds=first.batch_seconds, labels=True, workers=0)
    batch = next(iter(loader.epoch(0)))
    calls: dict[tuple[str, tuple[int, ...]], Callable[[], object]] = {}
    for name, (settings, learner) in learners.items():
        sampler = settings.sampler()
        kinds = {sampler.depths(step) for step in range(200)}
        for depths in sorted(kinds):
            calls[name, depths] = functools.partial(learner.step, 0, batch, depths, _RATE)
    found: dict[str, dict[str, float]] = {}
    # a step waits for the device: it returns the loss
    for (name, depths), seconds in median_seconds(calls, rounds).items():
        found.setdefault(name, {})["+".join(map(str, depths))] = seconds
    return found


_KINDS: dict[str, Callable[..., Done]] = {
    "scratch": _finetune,
    "pretrained": _finetune,
    "frozen": _finetune,
    "pretrain": _pretrain,
    "probe": _probe,
    "random": _probe,
    "timing": _timing,
}
