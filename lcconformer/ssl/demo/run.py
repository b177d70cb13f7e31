"""``python -m lcconformer demo``: the whole idea on real speech, in minutes, on two CPU cores.

Two encoders of one shared layer are pretrained from the same weights on the same batches: one with the number of loops
drawn anew for every step (arXiv 2105.00812), its twin always with all loops.  Then their depths are compared with each
other and with untrained weights, and a report is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...config import ConformerConfig
from ...data import Corpus, demo_corpus, load_corpus
from ...encoder import ConformerEncoder
from ...runtime import ProgressBar
from ..evaluation.classifiers import PROBES
from ..evaluation.consistency import model_consistency, summarise
from ..evaluation.depth_timing import time_depths
from ..evaluation.hidden_states import random_init_like
from ..evaluation.output import describe_machine, write_json
from ..evaluation.probes import LOG_MEL, TOLERANCE, ProbeSettings, accuracies, probe_model, smallest_depth
from ..model import PretrainingModel
from ..objectives import ObjectiveSettings
from ..pretraining.run import pretrain
from ..pretraining.settings import PretrainResult, PretrainSettings, StepRecord
from ..pretraining.speech import hold_out_speakers
from .report import format_results, write_report

__all__ = ["DemoPlan", "add_arguments", "run", "run_demo"]

SAMPLED, FIXED, RANDOM = "sampled depth", "fixed depth", "random init"
_MINUTES = 5.0
# of the time of a whole demo, what the two trainings may take; the rest measures
_TRAINING = 0.6
_MOST_TRAIN_MINUTES, _MOST_TEST_MINUTES = 60.0, 5.0  # of speech
_STEPS_PER_MINUTE = 120  # at most, so that machines that are fast enough all run the same steps


@dataclass(frozen=True)
class DemoPlan:
    """What a demo does.

    Attributes:
        settings: of the sampled run; its twin differs in ``depth`` alone.
        probe: settings of the probes.
        consistency_frames: real frames that the depths are compared on.
        rounds: measurements of inference time at each depth.
    """

    settings: PretrainSettings
    probe: ProbeSettings
    consistency_frames: int = 4096
    rounds: int = 9


def default_plan(steps: int) -> DemoPlan:
    """The small encoder of the demo, its training over ``steps`` steps, and its probes."""
    config = ConformerConfig(
        d_model=128,
        num_heads=4,
        ffn_dim=512,
        num_layers=8,
        conv_kernel_size=15,
        dropout=0.0,
        input_dim=80,
        subsampling="stack",
        subsampling_factor=4,
    )
    settings = PretrainSettings(
        config,
        objective=ObjectiveSettings("reconstruction"),
        depth="uniform",
        steps=steps,
        learning_rate=5e-4,
        warmup=0.1,
        batch_seconds=20.0,
        crop_seconds=15.0,
        device="cpu",
        validate_every=steps,
        checkpoint_every=steps,
    )
    # a machine with time for fewer steps measures on fewer frames; the probes' own steps stay as many, they need them
    frames = min(60_000, 100 * steps)
    return DemoPlan(settings, ProbeSettings(max_frames=frames, hidden=128, epochs=round(240_000 / frames)))


class Stages:
    """One progress bar over stages that take about so many parts of the whole.

    Args:
        shares: by name, in order.
        show: on the standard error.
    """

    def __init__(self, shares: dict[str, float], show: bool) -> None:
        total = sum(shares.values())
        self._ends = dict(zip(shares, np.cumsum(list(shares.values())) / total))
        self._shares = {name: share / total for name, share in shares.items()}
        self._number = {name: f"[{i}/{len(shares)}]" for i, name in enumerate(shares, 1)}
        self._bar = ProgressBar() if show else None
        self.name = ""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Within it, call ``report(part of the stage done, a word on it)``."""
        self.name = name

        def report(part: float, note: str = "") -> None:
            if self._bar is not None:
                done = self._ends[name] - self._shares[name] * (1.0 - part)
                self._bar.update(done, f"{self._number[name]} {name}  {note}".rstrip())

        report(0.0)
        yield report
        report(1.0)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run_demo(
    train: Corpus, test: Corpus, plan: DemoPlan, out: str | os.PathLike[str], *, progress: bool = True
) -> dict:
    """Run both trainings and every measurement; write ``results.json``, ``report.html`` and the PNG files to ``out``.

    Everything is written at the end.  Without phone alignments the probes are left out.

    Args:
        train, test: speech; ``test`` is used for held-out losses, consistency, inference times and probe accuracy.
        plan: what to do.
        out: folder; made if missing.
        progress: show a bar on the standard error.

    Returns:
        What ``results.json`` holds.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing was written.
        ImportError: tqdm or matplotlib is missing.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    out = Path(out)
    settings = plan.settings
    config = settings.config
    n = config.num_layers
    depths = list(range(n + 1))
    expected = settings.sampler().mean_depth(settings.steps) / n
    names = {SAMPLED: settings, FIXED: dataclasses.replace(settings, depth="fixed")}
    aligned = any(u.phones for u in train) and any(u.phones for u in test)
    shares = {
        SAMPLED: expected,
        FIXED: 1.0,
        "consistency": 0.1,
        "inference time": 0.1,
        "probes": 0.8 if aligned else 0.0,
    }
    stages = Stages({f"training, {k}" if k in names else k: v for k, v in shares.items() if v}, progress)
    training: dict[str, dict[str, Any]] = {}
    models: dict[str, PretrainingModel] = {}
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(stages.close)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".running-", dir=out)))
        checkpoints = {}
        for name, own in names.items():
            with stages.stage(f"training, {name}") as report:
                result, training[name] = _train(own, train, test, scratch / own.depth, report)
            models[name] = result.model
            checkpoints[own.depth] = result.checkpoint
        models[RANDOM] = random_init_like(models[SAMPLED], settings.seed)

        matrices = {}
        with stages.stage("consistency") as report:
            for number, (name, model) in enumerate(models.items(), 1):
                matrices[name] = model_consistency(model, test, max_frames=plan.consistency_frames, seed=settings.seed)
                report(number / len(models))

        with stages.stage("inference time"):
            times = time_depths(models, test, depths[1:], rounds=plan.rounds)

        rows: list[dict[str, Any]] = []
        if aligned:
            with stages.stage("probes") as report:
                for number, (name, model) in enumerate(models.items()):

                    def part_done(part: float, number: int = number) -> None:
                        report((number + part) / len(models))

                    rows += probe_model(
                        model,
                        train,
                        test,
                        depths,
                        settings=plan.probe,
                        name=name,
                        log_mel=number == 0,
                        progress=part_done,
                    )
        speech = times[SAMPLED].audio_seconds
        for row in rows:
            if row["features"] != LOG_MEL and row["depth"]:
                row["ms_per_second"] = 1e3 * times[row["features"]].seconds[row["depth"]] / speech
        results: dict[str, Any] = {
            "parameters": _parameters(config),
            "training": training,
            "saving": _saving(training, n),
            "consistency": {
                name: {"summary": summarise(m), **{k: v.tolist() for k, v in m.items()}} for name, m in matrices.items()
            },
            "inference": {
                "batch": {k: v for k, v in dataclasses.asdict(times[SAMPLED]).items() if k != "seconds"},
                "ms_per_second": {
                    name: {str(k): 1e3 * s / speech for k, s in t.seconds.items()} for name, t in times.items()
                },
            },
            "probe": {"rows": rows, "settings": dataclasses.asdict(plan.probe)} if aligned else None,
            "smallest_depth": _choose(rows, times[SAMPLED].seconds) if aligned else None,
            "setup": {
                "config": json.loads(config.to_json()),
                "objective": dataclasses.asdict(settings.objective),
                "training": settings.describe(),
                "train": _describe(train),
                "test": _describe(test),
                "machine": describe_machine(),
            },
        }
        results["setup"]["wall_seconds"] = time.perf_counter() - began
        results["setup"]["cpu_seconds"] = time.process_time() - cpu_began
        for depth, checkpoint in checkpoints.items():
            os.replace(checkpoint, out / f"{depth}.safetensors")
    write_report(out, results)
    write_json(out / "results.json", results)
    return results


def _train(
    settings: PretrainSettings, train: Corpus, test: Corpus, folder: Path, report: Callable[..., None]
) -> tuple[PretrainResult, dict[str, Any]]:
    cpu: list[float] = []  # processor time at the end of each step; the first one also warms up

    def on_step(record: StepRecord) -> None:
        cpu.append(time.process_time())
        note = f"step {record.step}/{settings.steps}  loss {record.loss:.3f}  loops {record.depths[0]}"
        report(record.step / settings.steps, note)

    result = _to_the_end(pretrain(settings, train, test, out=folder, on_step=on_step, progress=False))
    history = result.history
    last = history[-max(1, len(history) // 10) :]
    return result, {
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


def _to_the_end(result: PretrainResult) -> PretrainResult:
    """The result, unless the run was told to stop: pretraining keeps what it has, a demo has no use for half a run."""
    if result.stopped != "steps":
        raise KeyboardInterrupt
    return result


def _parameters(config: ConformerConfig) -> dict[str, Any]:
    """Counted on the encoders themselves, shared and not, beside the formula (N P + O) / (P + O)."""
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
    """The smallest depth near the best of the sampled model, by probe, and the inference time it saves."""
    full = max(seconds)
    chosen: dict[str, Any] = {"tolerance": TOLERANCE, "kind": "relative"}
    for probe in PROBES:
        depth = smallest_depth(accuracies(rows, SAMPLED, probe))
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


def load_demo_speech(path: str | None, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Training and test speech, in memory: the corpus's own splits, or else some speakers held out; one hour at most.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`~lcconformer.data.load_corpus`; or nothing can be held out.
    """
    corpus = demo_corpus() if path is None else load_corpus(path)
    if {"train", "test"} <= set(corpus.splits):
        train, test = corpus.select(splits=["train"]), corpus.select(splits=["test"])
    else:
        held = hold_out_speakers([corpus], seed)
        if not held:
            raise ValueError(
                f"{corpus.name} has one speaker and no splits 'train' and 'test': nothing can be held out for the test; "
                "give speech of two speakers or more, or set the splits in its meta.jsonl"
            )
        train, test = corpus.select(exclude_speakers=held), corpus.select(speakers=held)
    return _at_most(train, _MOST_TRAIN_MINUTES, seed).preload(), _at_most(test, _MOST_TEST_MINUTES, seed).preload()


def _at_most(corpus: Corpus, minutes: float, seed: int) -> Corpus:
    """Utterances drawn at random up to so many minutes, at least one."""
    ids: list[str] = []
    seconds = 0.0
    for index in np.random.default_rng(seed).permutation(len(corpus)):
        utterance = corpus[int(index)]
        if ids and seconds + utterance.seconds > 60.0 * minutes:
            break
        ids.append(utterance.id)
        seconds += utterance.seconds
    return corpus.select(ids=ids)


def fitting_steps(step_seconds: float, minutes: float, mean_share: float) -> int:
    """Steps that two runs have time for in a demo of so many minutes.

    Args:
        step_seconds: of a step through all loops.
        minutes: of the whole demo.
        mean_share: of the loops that the sampled run's steps have.
    """
    fit = _TRAINING * 60.0 * minutes / (step_seconds * (1.0 + mean_share))
    return max(20, min(math.floor(fit), round(_STEPS_PER_MINUTE * minutes)))


def _measure_step(train: Corpus) -> float:
    """Seconds of a step through all loops here, the lesser of the last two of four."""
    settings = dataclasses.replace(default_plan(4).settings, depth="fixed")
    with tempfile.TemporaryDirectory() as folder:
        history = _to_the_end(pretrain(settings, train, out=folder, progress=False)).history
    return min(r.compute_s + r.data_s for r in history[-2:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "It uses two CPU threads and no network.  DIR gets report.html (one file, plots inside), the plots as PNG files, "
        "results.json, and both checkpoints, which 'probe' and 'consistency' read."
    )
    parser.add_argument(
        "--out", default="lcconformer-demo", metavar="DIR", help="folder of the report (default: ./lcconformer-demo)"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="your own speech: a LibriSpeech folder tree, or a zip or folder with meta.jsonl; probes need its phone "
        "alignments (default: the 23 minutes of English prompts that come with the package)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        help=f"about how long it may take on two cores (default {_MINUTES:g})",
    )


def run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.minutes <= 600:
        raise ValueError(f"--minutes is {args.minutes:g}; expected 0.5 to 600")
    from ..evaluation import figures  # noqa: F401  (matplotlib missing should show now, not after minutes)

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        train, test = load_demo_speech(args.data)
        print(f"training speech: {train}\ntest speech:     {test}", file=sys.stderr)
        sampler = default_plan(1).settings.sampler()
        steps = fitting_steps(_measure_step(train), args.minutes, sampler.mean_depth() / sampler.num_layers)
        results = run_demo(train, test, default_plan(steps), args.out)
    except KeyboardInterrupt:
        print(f"interrupted: nothing of this run was kept, and nothing was written to {args.out}", file=sys.stderr)
        return 130
    print(format_results(results))
    print(f"\nreport: {Path(args.out) / 'report.html'}")
    return 0
