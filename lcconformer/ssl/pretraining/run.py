"""The training loop: the same steps whatever the number of processes, and after any interruption.

Everything random is a function of the seed and the step: the order of the data, the masks, the depth, the dropout.  A
checkpoint therefore holds tensors and counters, but no generator states.  The loss is the mean over the masked frames of all
batches of a step on all ranks, so that W ranks with A batches each take the same step as one rank with W x A batches.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...data import Batch, Corpus
from ...data.features import SAMPLE_RATE
from ..checkpoint import Checkpoint, checkpoint_path, find_checkpoints, load_checkpoint
from .checkpoints import RunCheckpoints
from .counters import MOST_SKIPPED, Counters, diverged
from .distributed import Ranks, join_ranks
from .draws import batch_masks
from .feed import StepFeed, validation_loader
from .learner import Learner
from .lock import lock_folder
from .logs import Reports
from .optim import learning_rate_scale
from .settings import PretrainResult, PretrainSettings, StepRecord
from .signals import STOP_SIGNALS, StopSignals
from .validation import validation_losses

__all__ = ["pretrain"]


def pretrain(
    settings: PretrainSettings,
    train: Corpus,
    validation: Corpus | None = None,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: bool = True,
    speech: Mapping[str, Any] | None = None,
) -> PretrainResult:
    """Pretrain an encoder; under torchrun, one call in each process.

    Ctrl-C and SIGTERM (in the main thread) end the run after the current step, with a checkpoint; a second Ctrl-C ends it at
    once.  BatchNorm, where the encoder has it, takes its statistics over each batch of each rank.

    Args:
        settings: settings of the run.
        train, validation: speech; without ``validation`` there are no validation losses.
        out: folder for checkpoints (``step_*.safetensors``), ``steps.csv``, ``validation.csv`` and ``tensorboard/``.
        resume: continue from the newest checkpoint in ``out``, exactly as if the run had never been interrupted; start from
            the beginning if there is none.
        on_step: called after each step, on the first rank.
        progress: show progress on the standard error.
        speech: JSON on where the speech comes from, kept in the checkpoints for whoever resumes the run from them alone.

    Raises:
        ValueError: ``out`` is a file, or holds a run and ``resume`` is False; the checkpoint is damaged, or of other
            settings or data; the speech does not fit into batches; the gradient was not finite 20 times in a row; another run
            is in ``out``.
        OSError: no checkpoint can be written, before the first step or at the end; the message names the last good one.
        ImportError: tqdm is missing and ``progress`` is True.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a run, or one to be made")
    with contextlib.ExitStack() as stack:
        ranks = join_ranks(settings.device)
        if ranks.first:
            stack.enter_context(lock_folder(folder))
        found = find_checkpoints(folder)
        if found and not resume:
            raise ValueError(f"{folder} holds a run already ({found[-1].name}): resume it, or choose another folder")
        cuda = ranks.device.type == "cuda"
        stack.enter_context(torch.random.fork_rng([ranks.device] if cuda else [], enabled=True))
        checkpoints = RunCheckpoints(folder, settings, ranks, train, speech)
        run = _Run(settings, train, validation, ranks, checkpoints, load_checkpoint(found[-1]) if found else None)
        stop = stack.enter_context(StopSignals())
        checkpoints.rehearse(run.learner, run.counters)
        if ranks.first:
            run.reports = Reports(folder, run.counters.step, settings.steps if progress else None, on_step)
            stack.callback(run.reports.close)
        return run.train(stop)


class _Run:
    """The loop over the steps, with its reports, validations and checkpoints."""

    reports: Reports | None = None  # on the first rank

    def __init__(
        self,
        settings: PretrainSettings,
        train: Corpus,
        validation: Corpus | None,
        ranks: Ranks,
        checkpoints: RunCheckpoints,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.settings, self.ranks, self.checkpoints = settings, ranks, checkpoints
        self.learner = Learner(settings, ranks)
        self.feed = StepFeed(train, settings, ranks)
        self.validation = None if validation is None else validation_loader(validation, settings)
        self.sampler = settings.sampler()
        self.counters = Counters() if checkpoint is None else checkpoints.restore(checkpoint, self.learner)
        self.learner.distribute()
        self.began = time.perf_counter()

    def train(self, stop: StopSignals) -> PretrainResult:
        settings, counters = self.settings, self.counters
        self.learner.model.train()
        history: list[StepRecord] = []
        validated: list[tuple[int, tuple[float, ...]]] = []
        self.began = time.perf_counter() - counters.elapsed_s
        in_a_row, stopped = 0, "steps" if counters.step >= settings.steps else ""
        if self.reports is not None:
            self.reports.start(self.counters.progress(self.settings))
        with contextlib.closing(self.feed.steps(counters)) as steps:
            while not stopped:
                skipped_before = counters.skipped
                record = self._step(steps)
                in_a_row = in_a_row + 1 if record.skipped > skipped_before else 0
                history.append(record)
                self._report(record, in_a_row)
                stopped = self._reason_to_stop(stop)
                if stopped in ("steps", "minutes") or counters.step % settings.validate_every == 0:
                    losses = self._validate()
                    if losses:
                        validated.append((counters.step, losses))
                # checkpoints during a series of skipped steps would displace the good ones
                if stopped or (counters.step % settings.checkpoint_every == 0 and not in_a_row):
                    self.checkpoints.save(self.learner, counters, last=bool(stopped))
        model = self.learner.model.eval()
        newest = self.checkpoints.newest or checkpoint_path(self.checkpoints.folder, counters.step)
        return PretrainResult(model, newest, history, validated, stopped)

    def _step(self, steps: Iterator[list[Batch]]) -> StepRecord:
        settings, counters, model = self.settings, self.counters, self.learner.model
        waiting = time.perf_counter()
        batches = next(steps)
        epoch = counters.epoch
        masks = [batch_masks(model, batch, settings.seed, counters.step) for batch in batches]
        started = time.perf_counter()
        depths = self.sampler.depths(counters.step)
        rate = settings.learning_rate * learning_rate_scale(self.counters.progress(self.settings), settings.warmup)
        layers = self.sampler.layers(counters.step)
        update = self.learner.step(counters.step, batches, masks, depths, rate, layers)
        now = time.perf_counter()
        # all ranks use the clock of the first one
        loss, elapsed = self.ranks.total([update.loss, self.ranks.first * (now - self.began)])
        counters.step += 1
        counters.elapsed_s = elapsed
        counters.skipped += update.skipped
        return StepRecord(
            step=counters.step,
            epoch=epoch,
            depths=depths,
            loss=loss,
            grad_norm=update.grad_norm,
            learning_rate=rate,
            utterances=update.utterances,
            seconds=update.samples / SAMPLE_RATE,
            compute_s=now - started,
            data_s=started - waiting,
            elapsed_s=elapsed,
            skipped=counters.skipped,
        )

    def _report(self, record: StepRecord, in_a_row: int) -> None:
        """Report a step on the first rank.

        Raises:
            ValueError: on all ranks, if this was one skipped step too many.
        """
        if self.reports is not None:
            if in_a_row:
                self.reports.skipped(record, in_a_row, MOST_SKIPPED)
            self.reports.step(record, self.counters.progress(self.settings))
        if in_a_row >= MOST_SKIPPED:
            raise diverged(record.step, in_a_row, self.settings, self.checkpoints.newest)

    def _reason_to_stop(self, stop: StopSignals) -> str:
        """Reason to end the run after this step, the same on all ranks; empty if it continues."""
        received = self.ranks.total([stop.received == name for name in STOP_SIGNALS])
        if any(received):
            return STOP_SIGNALS[received.index(max(received))]
        return self.counters.limit(self.settings)

    def _validate(self) -> tuple[float, ...]:
        """Loss at each depth, on the first rank only; the others wait for it in the next step."""
        if self.validation is None or self.reports is None:
            return ()
        losses = validation_losses(
            self.learner.model, self.validation, seed=self.settings.seed, device=self.ranks.device
        )
        self.reports.validation(self.counters.step, losses)
        return losses
