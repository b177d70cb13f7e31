"""The training loop of fine-tuning: the same steps after any interruption.

Everything random is a function of the seed and the step, as in pretraining: the order of the data, what SpecAugment hides,
the depth, the dropout.  Folder, lock, checkpoints and logs are those of a pretraining run.  One process trains.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...data import Batch, BatchLoader, Corpus
from ...data.features import SAMPLE_RATE
from ..checkpoint import checkpoint_path, find_checkpoints, load_checkpoint
from ..model import PretrainingModel
from ..pretraining import StepRecord
from ..pretraining.checkpoints import RunCheckpoints
from ..pretraining.counters import MOST_SKIPPED, Counters, diverged
from ..pretraining.distributed import join_ranks
from ..pretraining.lock import lock_folder
from ..pretraining.logs import Reports
from ..pretraining.optim import learning_rate_scale
from ..pretraining.signals import StopSignals
from .learner import Learner
from .settings import FinetuneResult, FinetuneSettings

__all__ = ["finetune"]


def finetune(
    settings: FinetuneSettings,
    train: Corpus,
    validation: Corpus | None = None,
    *,
    out: str | os.PathLike[str],
    start: PretrainingModel | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: bool = True,
    speech: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Train an encoder to recognise speech, from a pretrained model or from random weights.

    Ctrl-C and SIGTERM (in the main thread) end the run after the current step, with a checkpoint; a second Ctrl-C ends it at
    once.

    Args:
        settings: settings of the run.
        train, validation: speech with alignments, transcripts or both, as the tasks need; without ``validation`` there are no
            validation losses.
        out: folder for checkpoints (``step_*.safetensors``), ``steps.csv``, ``validation.csv`` and ``tensorboard/``.
        start: model whose encoder's weights are the first ones; its ``config`` and ``feature_settings`` must be those of
            ``settings``.  A resumed run does not look at it.  None: random weights.
        resume: continue from the newest checkpoint in ``out``, exactly as if the run had never been interrupted; start from
            the beginning if there is none.
        on_step: called after each step.
        progress: show progress on the standard error.
        speech: JSON on where the speech comes from, kept in the checkpoints for whoever resumes the run from them alone.

    Raises:
        ValueError: ``out`` is a file, or holds a run and ``resume`` is False; the checkpoint is damaged, or of other
            settings or data; the speech lacks what the tasks need, or does not fit into batches; the gradient was not finite
            20 times in a row; another run is in ``out``.
        OSError: no checkpoint can be written, before the first step or at the end; the message names the last good one.
        ImportError: tqdm is missing and ``progress`` is True.
        NotImplementedError: torchrun started several processes.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a run, or one to be made")
    with contextlib.ExitStack() as stack:
        ranks = join_ranks(settings.device)
        if ranks.world_size > 1:
            raise NotImplementedError(f"fine-tuning takes one process, got {ranks.world_size}: run it without torchrun")
        stack.enter_context(lock_folder(folder))
        found = find_checkpoints(folder)
        if found and not resume:
            raise ValueError(f"{folder} holds a run already ({found[-1].name}): resume it, or choose another folder")
        cuda = ranks.device.type == "cuda"
        stack.enter_context(torch.random.fork_rng([ranks.device] if cuda else [], enabled=True))
        checkpoints = RunCheckpoints(folder, settings, ranks, train, speech)
        learner = Learner(settings, train, validation, ranks.device, None if found else start)
        counters = checkpoints.restore(load_checkpoint(found[-1]), learner) if found else Counters()
        run = _Run(settings, train, validation, learner, checkpoints, counters)
        stop = stack.enter_context(StopSignals())
        checkpoints.rehearse(learner, counters)
        reports = Reports(folder, counters.step, settings.steps if progress else None, on_step)
        stack.callback(reports.close)
        return run.train(reports, stop)


class _Run:
    """The loop over the steps, with its reports, validations and checkpoints."""

    def __init__(
        self,
        settings: FinetuneSettings,
        train: Corpus,
        validation: Corpus | None,
        learner: Learner,
        checkpoints: RunCheckpoints,
        counters: Counters,
    ) -> None:
        self.settings, self.learner, self.checkpoints, self.counters = settings, learner, checkpoints, counters
        self.sampler = settings.sampler()
        options: dict[str, Any] = {"max_seconds": settings.batch_seconds, "labels": True, "workers": settings.workers}
        self.loader = BatchLoader(train, seed=settings.seed, **options)
        self.validation = None if validation is None else BatchLoader(validation, shuffle=False, **options)
        self.began = 0.0

    def train(self, reports: Reports, stop: StopSignals) -> FinetuneResult:
        settings, counters = self.settings, self.counters
        history: list[StepRecord] = []
        validated: list[tuple[int, tuple[float, ...]]] = []
        in_a_row, stopped = 0, "steps" if counters.step >= settings.steps else ""
        self.began = time.perf_counter() - counters.elapsed_s
        reports.start(self.counters.progress(self.settings))
        with contextlib.closing(self._batches()) as batches:
            while not stopped:
                record = self._step(batches)
                in_a_row = 0 if math.isfinite(record.grad_norm) else in_a_row + 1
                if in_a_row:
                    reports.skipped(record, in_a_row, MOST_SKIPPED)
                history.append(record)
                reports.step(record, self.counters.progress(self.settings))
                if in_a_row >= MOST_SKIPPED:
                    raise diverged(record.step, in_a_row, settings, self.checkpoints.newest)
                stopped = stop.received or counters.limit(settings)
                due = stopped in ("steps", "minutes") or counters.step % settings.validate_every == 0
                if due and self.validation is not None:
                    validated.append((counters.step, self.learner.validate(self.validation.epoch(0))))
                    reports.validation(*validated[-1])
                # checkpoints during a series of skipped steps would displace the good ones
                if stopped or (counters.step % settings.checkpoint_every == 0 and not in_a_row):
                    self.checkpoints.save(self.learner, counters, last=bool(stopped))
        newest = self.checkpoints.newest or checkpoint_path(self.checkpoints.folder, counters.step)
        return FinetuneResult(self.learner.model.eval(), newest, history, validated, stopped)

    def _batches(self) -> Generator[Batch, None, None]:
        """Training batches from where the counters stand, which they advance."""
        counters = self.counters
        while True:
            for batch in self.loader.epoch(counters.epoch, start=counters.position):
                counters.position += 1
                yield batch
            counters.epoch, counters.position = counters.epoch + 1, 0

    def _step(self, batches: Iterator[Batch]) -> StepRecord:
        settings, counters = self.settings, self.counters
        waiting = time.perf_counter()
        batch = next(batches)
        epoch, started = counters.epoch, time.perf_counter()
        depths = self.sampler.depths(counters.step)
        rate = settings.learning_rate * learning_rate_scale(self.counters.progress(self.settings), settings.warmup)
        loss, norm = self.learner.step(counters.step, batch, depths, rate, self.sampler.layers(counters.step))
        now = time.perf_counter()
        counters.step += 1
        counters.elapsed_s = now - self.began
        counters.skipped += not math.isfinite(norm)
        return StepRecord(
            step=counters.step,
            epoch=epoch,
            depths=depths,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            utterances=len(batch.ids),
            seconds=int(batch.lengths.sum()) / SAMPLE_RATE,
            compute_s=now - started,
            data_s=started - waiting,
            elapsed_s=counters.elapsed_s,
            skipped=counters.skipped,
        )
