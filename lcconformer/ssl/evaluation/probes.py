"""Phone probes: classifiers on the frozen hidden states of every depth, scored by frame accuracy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data import PHONES, Corpus, load_corpus
from ..model import PretrainingModel
from .classifiers import PROBES, train_probes
from .hidden_states import choose_frames, collect_states, stream_states

__all__ = ["LOG_MEL", "TOLERANCE", "ProbeSettings", "accuracies", "probe_model", "smallest_depth", "split_speech"]

LOG_MEL = "log-mel"
TOLERANCE = 0.01


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes:
        max_frames: largest number of training frames, drawn at random.  They are kept in memory as float16,
            ``2 (K D + C)`` bytes each for K depths of width D and C mel bins.  Test frames are never stored.
        hidden: width of the hidden layer of the second probe.
        epochs: passes over the training frames.
        seed: seed of the drawn frames, their order and the initial weights.

    Raises:
        ValueError: a value out of range.
    """

    max_frames: int = 300_000
    hidden: int = 256
    epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_frames", 1), ("hidden", 1), ("epochs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")


def probe_model(
    model: PretrainingModel,
    train: Corpus,
    test: Corpus,
    depths: Sequence[int],
    *,
    settings: ProbeSettings,
    name: str,
    log_mel: bool = False,
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """Train and score both probes at every depth.

    Args:
        model: the model, in evaluation mode; its device is used.
        train, test: speech with phone alignments; utterances without one are left out.
        depths: depths from 0 (the output of the front end) to N.
        settings: settings of the probes.
        name: name of the hidden states in the rows.
        log_mel: also probe the log-mel features.
        progress: called with the part that is done, 0 to 1.

    Returns:
        Rows ``{"features", "depth", "probe", "accuracy", "frames"}``: ``features`` is ``name``, or ``"log-mel"`` with depth
        None; ``probe`` is ``"linear"`` or ``"hidden"``; ``frames`` is the number of test frames.

    Raises:
        ValueError: there is no alignment, or no usable audio.
    """
    report = progress or (lambda part: None)
    chosen = choose_frames(train, max_frames=settings.max_frames, seed=settings.seed, labelled=True)
    scored = choose_frames(test, labelled=True)
    states = collect_states(model, train, chosen, depths)
    report(0.2)
    options: dict[str, Any] = {
        "classes": len(PHONES),
        "hidden": settings.hidden,
        "epochs": settings.epochs,
        "seed": settings.seed,
    }
    epochs = itertools.count(1)
    probes = train_probes(
        states.hidden, states.labels, progress=lambda: report(0.2 + 0.7 * next(epochs) / settings.epochs), **options
    )
    floor = train_probes(states.mel[None], states.labels, **options) if log_mel else None
    del states
    correct = torch.zeros(len(PROBES), len(depths), dtype=torch.int64)
    floor_correct = torch.zeros(len(PROBES), 1, dtype=torch.int64)
    frames = 0
    for part in stream_states(model, test, scored, depths):
        correct += probes.correct(part.hidden, part.labels).cpu()
        if floor is not None:
            floor_correct += floor.correct(part.mel[None], part.labels).cpu()
        frames += len(part.labels)
    if not frames:
        raise ValueError(f"none of the audio of {test.name} is usable; Corpus.skipped says why")
    report(1.0)

    def row(features: str, depth: int | None, probe: str, right: torch.Tensor) -> dict[str, Any]:
        return {
            "features": features,
            "depth": depth,
            "probe": probe,
            "accuracy": int(right) / frames,
            "frames": frames,
        }

    rows = [row(LOG_MEL, None, p, n[0]) for p, n in zip(PROBES, floor_correct) if floor is not None]
    rows += [row(name, k, p, correct[i, j]) for j, k in enumerate(depths) for i, p in enumerate(PROBES)]
    return rows


def split_speech(
    train_path: str,
    test_path: str,
    train_speakers: Collection[str] | None = None,
    test_speakers: Collection[str] | None = None,
) -> tuple[Corpus, Corpus]:
    """Load a training and a test corpus that share no utterance.

    Two different corpora are taken whole unless speakers are named.  One and the same corpus is separated by speaker (if only
    one side names speakers, the other side gets all the others), or, without names, by its splits ``train`` and ``test``.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`~lcconformer.data.load_corpus`.
        ValueError: a single corpus that nothing separates, or a speaker or an utterance on both sides.
    """
    train = load_corpus(train_path)
    if os.path.realpath(train_path) != os.path.realpath(test_path):
        test = load_corpus(test_path)
        train = train.select(speakers=train_speakers) if train_speakers else train
        test = test.select(speakers=test_speakers) if test_speakers else test
    elif train_speakers or test_speakers:
        both = sorted(set(train_speakers or ()) & set(test_speakers or ()))
        if both:
            raise ValueError(f"speaker {', '.join(both)} is in both --train-speakers and --test-speakers")
        corpus = train
        train = corpus.select(speakers=train_speakers or None, exclude_speakers=test_speakers or ())
        test = corpus.select(speakers=test_speakers or None, exclude_speakers=train_speakers or ())
    elif {"train", "test"} <= set(train.splits):
        train, test = train.select(splits=["train"]), train.select(splits=["test"])
    else:
        raise ValueError(
            f"training and test data are the same corpus, {train.name}, which has no splits 'train' and 'test': name "
            f"--test-speakers (it has {', '.join(train.speakers)}), or give another --test-data"
        )
    seen = {(u.id, u.num_samples, u.text) for u in train}
    twice = [u.id for u in test if (u.id, u.num_samples, u.text) in seen]
    if twice:
        raise ValueError(
            f"{len(twice)} utterances are in both training and test data ({', '.join(twice[:3])}, ...): "
            "separate them with --train-speakers and --test-speakers"
        )
    return train, test


def smallest_depth(accuracy: Mapping[int, float], tolerance: float = TOLERANCE) -> int:
    """Smallest depth whose accuracy is at least ``(1 - tolerance)`` times the best; depth 0, the front end, does not count.

    Args:
        accuracy: accuracy by depth, 0 to 1.
        tolerance: relative to the best accuracy: 0.01 allows 0.5 percentage points where the best is 50%.

    Raises:
        ValueError: there is no depth from 1 on.
    """
    loops = {depth: value for depth, value in accuracy.items() if depth >= 1}
    if not loops:
        raise ValueError(f"smallest_depth: depths {sorted(accuracy)}; expected at least one from 1 on")
    best = max(loops.values())
    return min(depth for depth, value in loops.items() if value >= (1.0 - tolerance) * best)


def accuracies(rows: Sequence[Mapping[str, Any]], features: str, probe: str) -> dict[int, float]:
    """Accuracy by depth, from the rows that have these features and this probe."""
    return {r["depth"]: r["accuracy"] for r in rows if r["features"] == features and r["probe"] == probe}
