"""Phone probes: classifiers on the frozen hidden states of every depth, scored by frame accuracy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data import IGNORE, PHONES, Corpus, load_corpus
from ..model import PretrainingModel
from ..pretraining.speech import hold_out_speakers
from .classifiers import PROBES, train_probes
from .hidden_states import Sequences, choose_utterances, collect_sequences, stream_sequences

__all__ = [
    "LOG_MEL",
    "TOLERANCE",
    "ProbeSettings",
    "accuracies",
    "best_depth",
    "probe_model",
    "smallest_depth",
    "split_speech",
    "split_validation",
]

LOG_MEL = "log-mel"
TOLERANCE = 0.01
_LOG_MEL_CONTEXT = 5  # frames on each side: the usual 11-frame window
_HELD_OUT = 0.05  # part of the utterances of a single speaker


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes:
        max_frames: number of training frames of 10 ms, in whole utterances that are drawn at random.  They are kept in memory
            as float16, about ``2 (K D / M + C)`` bytes each for K depths of width D, M frames per output and C mel bins.  Test
            frames are never stored.
        hidden: width of the hidden layer of the second probe.
        epochs: passes over the training frames.
        context: encoder outputs on each side that a probe sees besides its own; log-mel baselines always see 11 frames.
        seed: seed of the drawn utterances, their order and the initial weights.

    Raises:
        ValueError: a value out of range.
    """

    max_frames: int = 300_000
    hidden: int = 256
    epochs: int = 10
    context: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_frames", 1), ("hidden", 1), ("epochs", 1), ("context", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")


def probe_model(
    model: PretrainingModel,
    train: Corpus,
    validation: Corpus,
    test: Corpus,
    depths: Sequence[int],
    *,
    settings: ProbeSettings,
    name: str,
    log_mel: bool = False,
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """Train both probes at every depth, and score them on validation and test speech.

    Args:
        model: the model, in evaluation mode; its device is used.
        train, validation, test: speech with phone alignments; utterances without one are left out.
        depths: depths from 0 (the output of the front end) to N.
        settings: settings of the probes.
        name: name of the hidden states in the rows.
        log_mel: also probe the log-mel features, in a window of 11 frames.
        progress: called with the part that is done, 0 to 1.

    Returns:
        Rows ``{"features", "depth", "probe", "accuracy", "validation", "frames"}``: ``features`` is ``name``, or ``"log-mel"``
        with depth None; ``probe`` is ``"linear"`` or ``"hidden"``; ``accuracy`` is that of the test speech and ``frames`` its
        number of labelled frames; ``validation`` is the accuracy on the validation speech, which a depth is chosen by.

    Raises:
        ValueError: there is no alignment, or no usable audio.
    """
    report = progress or (lambda part: None)
    chosen = choose_utterances(train, max_frames=settings.max_frames, seed=settings.seed)
    scored = [(corpus, choose_utterances(corpus)) for corpus in (validation, test)]
    speech = collect_sequences(model, train, chosen, depths)
    report(0.2)
    options: dict[str, Any] = {
        "classes": len(PHONES),
        "hidden": settings.hidden,
        "epochs": settings.epochs,
        "seed": settings.seed,
    }
    epochs = itertools.count(1)
    probes = train_probes(
        speech.hidden,
        speech.labels,
        speech.spans,
        context=settings.context,
        whiten=True,
        progress=lambda: report(0.2 + 0.7 * next(epochs) / settings.epochs),
        **options,
    )
    floor = train_probes(*_by_frame(speech), context=_LOG_MEL_CONTEXT, whiten=False, **options) if log_mel else None
    del speech
    accuracy, frames = [], 0
    for corpus, utterances in scored:
        correct = torch.zeros(len(PROBES), len(depths) + (floor is not None), dtype=torch.int64)
        frames = 0
        for part in stream_sequences(model, corpus, utterances, depths):
            right = [probes.correct(part.hidden, part.labels, part.spans)]
            if floor is not None:
                right.append(floor.correct(*_by_frame(part)))
            correct += torch.cat(right, 1).cpu()
            frames += int((part.labels != IGNORE).sum())
        if not frames:
            raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")
        accuracy.append((correct / frames).tolist())
    report(1.0)

    def row(features: str, depth: int | None, probe: int, column: int) -> dict[str, Any]:
        return {
            "features": features,
            "depth": depth,
            "probe": PROBES[probe],
            "accuracy": accuracy[1][probe][column],
            "validation": accuracy[0][probe][column],
            "frames": frames,
        }

    kinds = range(len(PROBES))
    rows = [row(LOG_MEL, None, i, len(depths)) for i in kinds if floor is not None]
    return rows + [row(name, k, i, j) for j, k in enumerate(depths) for i in kinds]


def _by_frame(speech: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Log-mel features ``[1, U M, C]``, labels ``[U M, 1]`` and spans ``[U M, 2]`` of the 10 ms frames."""
    outputs, merged, bins = speech.mel.shape
    spans = speech.spans * merged + speech.spans.new_tensor([0, merged - 1])
    return (
        speech.mel.view(1, outputs * merged, bins),
        speech.labels.view(-1, 1),
        spans.repeat_interleave(merged, 0),
    )


def split_validation(train: Corpus, speakers: Collection[str] | None = None, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Hold out a part of the training speech, by which the depth is chosen.

    Args:
        train: aligned speech.
        speakers: the speakers to hold out; None: some with 5% of the speech, or of a single speaker 5% of the utterances.
        seed: seed of the draw.

    Returns:
        The rest of the training speech, and the validation speech.

    Raises:
        ValueError: a speaker that ``train`` does not have, or nothing is left to train on.
    """
    held = speakers or hold_out_speakers([train], seed)
    if held:
        return train.select(exclude_speakers=held), train.select(speakers=held)
    if len(train) < 2:
        raise ValueError(f"{train.name} has one utterance to train on: nothing can be held out to choose the depth by")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(_HELD_OUT * len(train)))
    parts = order[count:], order[:count]
    rest, validation = (train.select(ids=[train[i].id for i in part]) for part in parts)
    return rest, validation


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


def best_depth(accuracy: Mapping[int, float]) -> int:
    """Depth of the highest accuracy, the smaller of equals; depth 0, the front end, does not count.

    Raises:
        ValueError: there is no depth from 1 on.
    """
    return smallest_depth(accuracy, 0.0)


def smallest_depth(accuracy: Mapping[int, float], tolerance: float = TOLERANCE) -> int:
    """Smallest depth whose accuracy is at least ``(1 - tolerance)`` times the best; depth 0, the front end, does not count.

    Args:
        accuracy: accuracy by depth, 0 to 1, on validation speech: chosen by test accuracy, a depth would flatter itself.
        tolerance: relative to the best accuracy: 0.01 allows 0.5 percentage points where the best is 50%.

    Raises:
        ValueError: there is no depth from 1 on.
    """
    loops = {depth: value for depth, value in accuracy.items() if depth >= 1}
    if not loops:
        raise ValueError(f"smallest_depth: depths {sorted(accuracy)}; expected at least one from 1 on")
    best = max(loops.values())
    return min(depth for depth, value in loops.items() if value >= (1.0 - tolerance) * best)


def accuracies(
    rows: Sequence[Mapping[str, Any]], features: str, probe: str, speech: str = "accuracy"
) -> dict[int, float]:
    """Accuracy by depth, from the rows that have these features and this probe.

    Args:
        speech: ``"accuracy"``: on the test speech; ``"validation"``: on the validation speech.
    """
    return {r["depth"]: r[speech] for r in rows if r["features"] == features and r["probe"] == probe}
