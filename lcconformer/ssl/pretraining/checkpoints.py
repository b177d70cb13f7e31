"""Checkpoints of a run: its state is saved, and restored if settings and data are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data import Corpus
from ..checkpoint import Checkpoint, checkpoint_path, find_checkpoints, save_checkpoint
from .counters import Counters
from .distributed import Ranks
from .learner import Learner
from .settings import PretrainSettings

__all__ = ["RunCheckpoints"]


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
        settings: PretrainSettings,
        ranks: Ranks,
        train: Corpus,
        speech: Mapping[str, Any] | None,
    ) -> None:
        self.folder, self._settings, self._ranks = folder, settings, ranks
        self._data, self._speech = fingerprint(train), speech
        self.newest: Path | None = None

    def save(self, learner: Learner, counters: Counters) -> None:
        """On the first rank, write a checkpoint and delete all but the newest ``settings.keep``."""
        self.newest = checkpoint_path(self.folder, counters.step)
        if not self._ranks.first:
            return
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
        save_checkpoint(self.newest, learner.tensors(), meta)
        for old in find_checkpoints(self.folder)[: -self._settings.keep]:
            old.unlink()

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
        if meta["data"] != self._data:
            raise ValueError(
                f"cannot resume {path} with other data: it was trained on {meta['data']}, this is {self._data}: give the "
                "same data, or another folder for a new run"
            )
        try:
            learner.load(checkpoint.section("model."), checkpoint.section("optimizer."), meta["scaler"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit its own settings: {error}") from error
        self.newest = path
        if self._speech is None:
            self._speech = meta.get("speech")
        return Counters(**{field.name: meta[field.name] for field in dataclasses.fields(Counters)})


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
