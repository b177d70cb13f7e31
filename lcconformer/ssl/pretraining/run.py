"""The training loop: the same steps whatever the number of processes, and after any interruption.

Everything random is a function of the seed and the step: the order of the data, the masks, the depth, the dropout.  A
checkpoint therefore holds tensors and counters and no generator states.  The loss is the mean over the masked frames
of all batches of a step on all ranks, so W ranks with A batches each take the step of one rank with W x A batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...data import Batch, BatchLoader, Corpus, frame_count
from ...data.features import SAMPLE_RATE
from ..checkpoint import Checkpoint, checkpoint_path, find_checkpoints, load_checkpoint, save_checkpoint
from ..masking import Masks, draw_masks
from ..model import PretrainingModel
from .distributed import Ranks, join_ranks
from .logs import RunLog, StepBar
from .optim import learning_rate_scale, load_optimizer_tensors, make_optimizer, optimizer_tensors
from .settings import PretrainResult, PretrainSettings, StepRecord

__all__ = ["pretrain", "validation_losses"]

_MOST_SKIPPED = 20  # steps in a row; float16 loss scaling needs a handful to find its scale
_STOP = ("SIGINT", "SIGTERM")
_VALIDATION = (1 << 63) - 1  # in place of a step, in the masks and noise of the validation


def pretrain(
    settings: PretrainSettings,
    train: Corpus,
    validation: Corpus | None = None,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: bool = True,
) -> PretrainResult:
    """Pretrain an encoder; under torchrun, one call in each process.

    Ctrl-C and SIGTERM (in the main thread) end the run after the step at hand, with a checkpoint; a second Ctrl-C at once.
    BatchNorm, where the encoder has it, takes its statistics over each batch of each rank.

    Args:
        settings: of the run.
        train, validation: speech; without ``validation`` there are no validation losses.
        out: folder for checkpoints (``step_*.safetensors``), ``steps.csv``, ``validation.csv`` and ``tensorboard/``.
        resume: go on from the newest checkpoint in ``out``, exactly as if never interrupted; from the start if there is none.
        on_step: called after each step, on the first rank.
        progress: show it on the standard error.

    Raises:
        ValueError: ``out`` is a file, or holds a run and ``resume`` is False; the checkpoint is damaged, or of other
            settings or data; batches do not fit; a gradient that was not finite 20 times in a row.
        ImportError: tqdm is missing and ``progress`` is True.
    """
    folder = Path(out)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder of a run, or one to be made")
    found = find_checkpoints(folder)
    if found and not resume:
        raise ValueError(f"{folder} holds a run already ({found[-1].name}): resume it, or choose another folder")
    with contextlib.ExitStack() as stack:
        ranks = join_ranks(settings.device)
        cuda = ranks.device.type == "cuda"
        stack.enter_context(torch.random.fork_rng([ranks.device] if cuda else [], enabled=True))
        checkpoint = load_checkpoint(found[-1]) if found else None
        run = _Run(settings, train, validation, folder, ranks, checkpoint)
        stop = stack.enter_context(_StopSignals())
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            run.log = RunLog(folder, run.step)
            stack.callback(run.log.close)
            if progress:
                run.bar = StepBar(settings.steps)
                stack.callback(run.bar.close)
        return run.train(stop, on_step)


def validation_losses(
    model: PretrainingModel, loader: BatchLoader, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[float, ...]:
    """Loss at depth 1 ... N over the first epoch of ``loader``, with the same masks at every call."""
    device, was_training = torch.device(device), model.training
    depths = tuple(range(model.config.num_layers, 0, -1))
    total, terms = torch.zeros(len(depths), dtype=torch.float64), 0
    model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, batch in enumerate(loader.epoch(0)):
            masks = _masks(model, batch, seed, _VALIDATION)
            torch.manual_seed(_seed(seed, _VALIDATION, number))
            batch = batch.to(device)
            sums, _ = model(batch.audio, batch.lengths, masks.to(device), depths)
            total += sums.double().cpu()
            terms += model.objective.count(masks)
    model.train(was_training)
    return tuple((total.flip(0) / terms).tolist())


class _Run:
    """State of one run: model, optimizer, place in the data."""

    log: RunLog | None = None
    bar: StepBar | None = None

    def __init__(
        self,
        settings: PretrainSettings,
        train: Corpus,
        validation: Corpus | None,
        folder: Path,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.settings, self.folder, self.ranks = settings, folder, ranks
        if settings.precision == "float16" and ranks.device.type != "cuda":
            raise ValueError("precision is 'float16' on a CPU; expected 'float32' or 'bfloat16' there")
        crop = settings.crop_seconds and min(settings.crop_seconds, settings.batch_seconds)
        sizes: dict[str, Any] = {"max_seconds": settings.batch_seconds, "crop_seconds": crop}
        self.loader = BatchLoader(
            train,
            seed=settings.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=settings.workers,
            **sizes,
        )
        if self.loader.steps(0) < settings.accumulate:
            raise ValueError(
                f"{train.name} makes {self.loader.steps(0)} batches a rank, fewer than accumulate = {settings.accumulate}: "
                "lower accumulate or batch_seconds"
            )
        self.validation = None if validation is None else BatchLoader(validation, shuffle=False, **sizes)
        self.data = _fingerprint(train)
        torch.manual_seed(settings.seed)
        self.model = settings.build_model().to(ranks.device)
        self.optimizer = make_optimizer(self.model, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "float16")
        self.sampler = settings.sampler()
        self.step = self.epoch = self.position = self.skipped = 0
        self.elapsed = self.began = 0.0
        self.saved: Path | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        self.replica: nn.Module = self.model
        if ranks.world_size > 1:
            # a depth below N leaves the later of several unique layers without a gradient
            unused = len(self.model.encoder.layers) > 1 and settings.depth != "fixed"
            self.replica = DistributedDataParallel(self.model, find_unused_parameters=unused)

    def train(self, stop: _StopSignals, on_step: Callable[[StepRecord], None] | None) -> PretrainResult:
        settings, ranks = self.settings, self.ranks
        self.model.train()
        history: list[StepRecord] = []
        validated: list[tuple[int, tuple[float, ...]]] = []
        self.began = time.perf_counter() - self.elapsed
        in_a_row, stopped = 0, "steps" if self.step >= settings.steps else ""
        steps = self._batches()
        if self.bar is not None:
            self.bar.start(self._progress())
        while not stopped:
            record = self._step(steps)
            in_a_row = in_a_row + 1 if record.skipped > self.skipped else 0
            self.skipped = record.skipped
            history.append(record)
            self._report(record, in_a_row, on_step)
            if in_a_row >= _MOST_SKIPPED:
                raise ValueError(
                    f"the gradient was not finite in {in_a_row} steps in a row, up to step {self.step}: lower learning_rate "
                    f"({settings.learning_rate:g}) or raise warmup ({settings.warmup:g}); the last good checkpoint is "
                    f"{self.saved}"
                )
            received = ranks.total([stop.received == name for name in _STOP])
            if any(received):  # all ranks stop together
                stopped = _STOP[received.index(max(received))]
            elif self.step >= settings.steps:
                stopped = "steps"
            elif settings.max_minutes is not None and self.elapsed >= 60.0 * settings.max_minutes:
                stopped = "minutes"
            if stopped in ("steps", "minutes") or self.step % settings.validate_every == 0:
                losses = self._validate()
                if losses:
                    validated.append((self.step, losses))
            # a checkpoint in the middle of a spell of skipped steps would push out the good ones
            if stopped or (self.step % settings.checkpoint_every == 0 and not in_a_row):
                self._save()
        steps.close()
        self.model.eval()
        return PretrainResult(self.model, checkpoint_path(self.folder, self.step), history, validated, stopped)

    def _batches(self) -> Generator[list[Batch], None, None]:
        """The batches of each step, from the present place in the data on; moves that place."""
        many = self.settings.accumulate
        while True:
            batches = self.loader.epoch(self.epoch, start=self.position * many)
            for _ in range(self.position, self.loader.steps(self.epoch) // many):
                step = list(islice(batches, many))
                self.position += 1
                yield step
            self.epoch, self.position = self.epoch + 1, 0

    def _step(self, steps: Iterator[list[Batch]]) -> StepRecord:
        settings, ranks, model = self.settings, self.ranks, self.model
        waiting = time.perf_counter()
        batches = next(steps)
        epoch = self.epoch
        masks = [_masks(model, batch, settings.seed, self.step) for batch in batches]
        started = time.perf_counter()
        # what the losses of all ranks together are divided by
        terms, frames, utterances, samples = ranks.total(
            [
                sum(model.objective.count(m) for m in masks),
                sum(int(model.encoder.subsampled_lengths(frame_count(b.lengths)).sum()) for b in batches),
                sum(len(b.ids) for b in batches),
                sum(int(b.lengths.sum()) for b in batches),
            ]
        )
        depths = self.sampler.depths(self.step)
        rate = settings.learning_rate * learning_rate_scale(self._progress(), settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        statistics = [b.clone() for b in model.encoder.buffers()]
        loss = torch.zeros((), device=ranks.device)
        for number, (batch, mask) in enumerate(zip(batches, masks)):
            # dropout and noise: their own for each batch of the step, whichever rank has it
            torch.manual_seed(_seed(settings.seed, self.step, number * ranks.world_size + ranks.rank))
            batch, mask, last = batch.to(ranks.device), mask.to(ranks.device), number == len(batches) - 1
            alone = isinstance(self.replica, DistributedDataParallel) and not last
            with self.replica.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast():
                    sums, apart = self.replica(batch.audio, batch.lengths, mask, depths)
                objective = sums.mean() / terms + settings.distill * apart / frames
                # DDP averages over ranks what is to be summed
                self.scaler.scale(objective * ranks.world_size).backward()
            loss += sums.detach().mean() / terms
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.clip))
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # an enabled scaler leaves the step out by itself
        if not math.isfinite(norm):
            for buffer, before in zip(model.encoder.buffers(), statistics):
                buffer.copy_(before)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # all ranks go by the first one's clock
        now = time.perf_counter()
        mean, elapsed = ranks.total([float(loss), ranks.first * (now - self.began)])
        self.step, self.elapsed = self.step + 1, elapsed
        return StepRecord(
            step=self.step,
            epoch=epoch,
            depths=depths,
            loss=mean,
            grad_norm=norm,
            learning_rate=rate,
            utterances=int(utterances),
            seconds=samples / SAMPLE_RATE,
            compute_s=now - started,
            data_s=started - waiting,
            elapsed_s=elapsed,
            skipped=self.skipped + (not math.isfinite(norm)),
        )

    def _progress(self) -> float:
        """Part of the run that is over, in the middle of the coming step."""
        done = (self.step + 0.5) / self.settings.steps
        if self.settings.max_minutes is not None:
            done = max(done, self.elapsed / (60.0 * self.settings.max_minutes))
        return min(done, 1.0)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=getattr(torch, self.settings.precision))

    def _report(self, record: StepRecord, in_a_row: int, on_step: Callable[[StepRecord], None] | None) -> None:
        if not self.ranks.first:
            return
        if in_a_row:
            warnings.warn(
                f"step {record.step} left out: its gradient is not finite ({record.skipped} such steps so far, {in_a_row} in "
                f"a row; the run ends at {_MOST_SKIPPED})",
                UserWarning,
                stacklevel=2,
            )
        if self.log is not None:
            self.log.step(record)
        if self.bar is not None:
            self.bar.step(record, self._progress())
        if on_step is not None:
            on_step(record)

    def _validate(self) -> tuple[float, ...]:
        """Loss at each depth on the first rank; the others wait for it at the next step's sum."""
        if self.validation is None or not self.ranks.first:
            return ()
        losses = validation_losses(self.model, self.validation, seed=self.settings.seed, device=self.ranks.device)
        if self.log is not None:
            self.log.validation(self.step, losses)
        if self.bar is not None:
            self.bar.say(f"step {self.step}: validation loss {losses[-1]:.4f} at depth {len(losses)}")
        return losses

    def _save(self) -> None:
        self.saved = checkpoint_path(self.folder, self.step)
        if not self.ranks.first:
            return
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        state = optimizer_tensors(self.optimizer, self.model)
        tensors.update({f"optimizer.{name}": x for name, x in state.items()})
        meta = {
            **self.model.describe(),
            "settings": self.settings.describe(),
            "data": self.data,
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "skipped": self.skipped,
            "elapsed_s": self.elapsed,
            "world_size": self.ranks.world_size,
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.saved, tensors, meta)
        for old in find_checkpoints(self.folder)[: -self.settings.keep]:
            old.unlink()

    def _restore(self, checkpoint: Checkpoint) -> None:
        meta, path = checkpoint.meta, checkpoint.path
        asked = {**self.model.describe(), "settings": self.settings.describe(), "world_size": self.ranks.world_size}
        # through JSON, so that tuples compare as lists
        asked = json.loads(json.dumps(asked))
        changed = [
            f"{key} was {was!r}, now {now!r}"
            for section, values in asked.items()
            for key, was, now in _differences(section, meta.get(section), values)
        ]
        if changed:
            raise ValueError(
                f"cannot resume {path} with other settings: {'; '.join(changed)}: give the same ones, or another folder for "
                "a new run"
            )
        if meta["data"] != self.data:
            raise ValueError(
                f"cannot resume {path} with other data: it was trained on {meta['data']}, this is {self.data}: give the same "
                "data, or another folder for a new run"
            )
        try:
            self.model.load_state_dict(checkpoint.section("model."))
            load_optimizer_tensors(self.optimizer, self.model, checkpoint.section("optimizer."))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit its own settings: {error}") from error
        self.scaler.load_state_dict(meta["scaler"])
        self.step, self.epoch, self.position = meta["step"], meta["epoch"], meta["position"]
        self.skipped, self.elapsed, self.saved = meta["skipped"], meta["elapsed_s"], path


class _StopSignals:
    """Remembers SIGINT or SIGTERM; a second one has its usual effect, except under torchrun, which itself repeats them."""

    received = ""

    def __enter__(self) -> _StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in map(signal.Signals.__getitem__, _STOP):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number).name
        if not dist.is_torchelastic_launched():
            signal.signal(number, self._before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _seed(seed: int, step: int, number: int) -> int:
    """A 64-bit seed for torch's generator."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])


def _masks(model: PretrainingModel, batch: Batch, seed: int, step: int) -> Masks:
    objective = model.objective_settings
    return draw_masks(
        batch.ids,
        frame_count(batch.lengths).tolist(),
        seed=seed,
        step=step,
        fraction=objective.fraction,
        span=objective.span,
        factor=model.config.subsampling_factor,
        bert=model.objective.bert,
    )


def _fingerprint(corpus: Corpus) -> str:
    """Tells other data from the same: ids and lengths of all utterances."""
    text = "\n".join(f"{u.id} {u.num_samples}" for u in corpus)
    return f"{len(corpus)} utterances ({hashlib.blake2b(text.encode(), digest_size=6).hexdigest()})"


def _differences(section: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(was, dict) or not isinstance(now, dict):
        if was != now:
            yield section, was, now
        return
    for key in sorted({*was, *now}):
        if was.get(key) != now.get(key):
            yield key, was.get(key), now.get(key)
