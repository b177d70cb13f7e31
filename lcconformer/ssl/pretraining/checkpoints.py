"""Checkpoints of a run: its state is saved, and restored if settings and data are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...data import Corpus
from ...runtime import RunError
from ...validation import need_integer, need_number
from ..checkpoint import Checkpoint, checkpoint_path, find_checkpoints, save_checkpoint
from .counters import Counters
from .distributed import Ranks

__all__ = ["Described", "Learner", "RunCheckpoints", "Settings"]


class Settings(Protocol):
    """What checkpoints need of the settings of a run."""

    @property
    def keep(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...
    def describe_free(self) -> dict[str, Any]: ...


class Described(Protocol):
    """A model that says how to build it."""

    def describe(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class Learner(Protocol):
    """What checkpoints need of a model in training."""

    @property
    def model(self) -> Described: ...
    @property
    def scaler(self) -> torch.amp.GradScaler: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], scaler: dict[str, Any]) -> None: ...


class RunCheckpoints:
    """Checkpoints in the folder of a run.

    Args:
        folder: folder of the run.
        settings, ranks, train: settings, processes and speech of the run; checkpoints of other ones are refused.
        speech: JSON that says where the speech comes from, stored unchanged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        ranks: Ranks,
        train: Corpus,
        speech: Mapping[str, Any] | None,
    ) -> None:
        self.folder, self._settings, self._ranks = folder, settings, ranks
        self._data, self._speech = fingerprint(train), speech
        self.newest: Path | None = None

    def rehearse(self, learner: Learner, counters: Counters) -> None:
        """On the first rank, write a checkpoint and delete it: what would be in its way must show before the training.

        Raises:
            RunError: it cannot be written.
        """
        if not self._ranks.first:
            return
        for left in self.folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)  # by a process that was killed while it wrote
        path = self.folder / "rehearsal.safetensors"
        try:
            self._write(path, learner, counters)
        except OSError as error:
            raise RunError(
                f"no checkpoint can be written to {self.folder} ({error}): make room there or choose another folder; no step "
                f"was trained"
            ) from error
        finally:
            path.unlink(missing_ok=True)

    def save(self, learner: Learner, counters: Counters, *, last: bool = False) -> None:
        """On the first rank, write a checkpoint, and only then delete all but the newest ``settings.keep``.

        One that cannot be written (a full disk) costs a warning, and the run goes on to the next.

        Raises:
            RunError: it cannot be written and is the ``last`` of the run.
        """
        path = checkpoint_path(self.folder, counters.step)
        if self._ranks.first:
            try:
                self._write(path, learner, counters)
            except OSError as error:
                kept = f"the last good one is {self.newest}" if self.newest else "there is no earlier one"
                lost = f"the checkpoint of step {counters.step} cannot be written ({error}); {kept}"
                if last:
                    raise RunError(f"{lost}: make room, then resume the run") from error
                warnings.warn(f"{lost}; the run goes on", UserWarning, stacklevel=2)
                return
            for old in find_checkpoints(self.folder)[: -self._settings.keep]:
                old.unlink(missing_ok=True)
        self.newest = path

    def _write(self, path: Path, learner: Learner, counters: Counters) -> None:
        meta = {
            **learner.model.describe(),
            "settings": self._settings.describe(),
            "free_settings": self._settings.describe_free(),
            "speech": self._speech,
            "data": self._data,
            **dataclasses.asdict(counters),
            "world_size": self._ranks.world_size,
            "scaler": learner.scaler.state_dict(),
        }
        save_checkpoint(path, learner.tensors(), meta)

    def restore(self, checkpoint: Checkpoint, learner: Learner) -> Counters:
        """Load a checkpoint into ``learner``; returns the counters to continue from.

        Raises:
            ValueError: the checkpoint has other settings, data or number of ranks, or its tensors do not fit.
        """
        meta, path = checkpoint.meta, checkpoint.path
        asked = {
            **learner.model.describe(),
            "settings": self._settings.describe(),
            "world_size": self._ranks.world_size,
        }
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
        if meta.get("data") != self._data:
            raise ValueError(
                f"cannot resume {path} with other data: it was trained on {meta.get('data')}, this is {self._data}: give the "
                "same data, or another folder for a new run"
            )
        counters = _counters(checkpoint)
        checkpoint.check("model.", learner.model.state_dict())
        scaler = meta.get("scaler")
        try:
            learner.load(
                checkpoint.section("model."),
                checkpoint.section("optimizer."),
                scaler if isinstance(scaler, dict) else {"scaler": scaler},
            )
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; take an older checkpoint of the run") from error
        self.newest = path
        if self._speech is None:
            self._speech = meta.get("speech")
        return counters


def _counters(checkpoint: Checkpoint) -> Counters:
    """Return the counters of a checkpoint.

    Raises:
        ValueError: one is missing or out of range.
    """
    values: dict[str, Any] = {field.name: checkpoint.meta.get(field.name) for field in dataclasses.fields(Counters)}
    try:
        for name in ("step", "epoch", "position", "skipped"):
            need_integer("the counters", name, values[name], 0, 1 << 62)
        need_number("the counters", "elapsed_s", values["elapsed_s"], 0)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} is damaged: {error}; take an older checkpoint of the run") from error
    return Counters(**values)


def fingerprint(corpus: Corpus) -> str:
    """Identify data by the number of its utterances and a hash of their ids and lengths."""
    text = "\n".join(f"{u.id} {u.num_samples}" for u in corpus)
    return f"{len(corpus)} utterances ({hashlib.blake2b(text.encode(), digest_size=6).hexdigest()})"


def _differences(section: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value then, value now) for everything that differs."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        if was != now:
            yield section, was, now
        return
    for key in sorted({*was, *now}):
        if was.get(key) != now.get(key):
            yield key, was.get(key), now.get(key)
