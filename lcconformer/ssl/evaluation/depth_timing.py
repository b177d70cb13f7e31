"""Inference time at every depth, measured such that drift of the machine affects all depths and models alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...config import ConformerConfig
from ...data import BadAudioError, Corpus
from ...data.features import SAMPLE_RATE
from ...encoder import ConformerEncoder

__all__ = ["DepthTimes", "Timed", "median_seconds", "time_depths", "time_front"]

_UTTERANCES, _CROP_SECONDS = 8, 15.0
_Key = TypeVar("_Key")


class Timed(Protocol):
    """A model that can be timed: the one of pretraining, or one with other heads."""

    features: Any
    encoder: ConformerEncoder

    @property
    def config(self) -> ConformerConfig: ...


@dataclass(frozen=True)
class DepthTimes:
    """Inference time by depth.

    seconds: median wall-clock time of the encoder, by depth. utterances, audio_seconds: size of the batch, without padding.
    rounds: measurements per depth. threads: number of torch's threads.
    """

    seconds: dict[int, float]
    utterances: int
    audio_seconds: float
    rounds: int
    threads: int


@torch.no_grad()
def time_depths(
    models: Mapping[str, Timed], corpus: Corpus, depths: Sequence[int], *, rounds: int = 9
) -> dict[str, DepthTimes]:
    """Time encoders, from log-mel features to hidden states, on one batch of utterances of median length.

    Every round runs all depths of all models, forwards and backwards in turn.  A first round is not counted.

    Args:
        models: models by name, in evaluation mode; their devices are used.
        corpus: where the utterances come from: up to 8, cropped to 15 s.
        depths: depths from 1 on; those beyond a model's N are left out for it.
        rounds: measurements per depth.

    Raises:
        ValueError: none of those utterances is usable.
    """
    batch, lengths = _typical_batch(corpus)
    runs = {
        (name, depth): _run(model, batch, lengths, depth)
        for name, model in models.items()
        for depth in depths
        if depth <= model.config.num_layers
    }
    medians = median_seconds(runs, rounds)
    return {
        name: DepthTimes(
            {depth: seconds for (whose, depth), seconds in medians.items() if whose == name},
            len(lengths),
            float(lengths.sum()) / SAMPLE_RATE,
            rounds,
            torch.get_num_threads(),
        )
        for name in models
    }


@torch.no_grad()
def time_front(models: Mapping[str, Timed], corpus: Corpus, *, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Time what comes ahead of the loops, on the batch of :func:`time_depths`: it is the same at every depth.

    Returns:
        For each model ``{"features_s", "front_end_s"}``, median seconds from audio to log-mel features, and from these to the
        input of the first loop, which :func:`time_depths` counts too.

    Raises:
        ValueError: none of the utterances is usable.
    """
    batch, lengths = _typical_batch(corpus)
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for name, model in models.items():
        runs[name, "features_s"], runs[name, "front_end_s"] = _front_runs(model, batch, lengths)
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, part), seconds in median_seconds(runs, rounds).items():
        found[name][part] = seconds
    return found


def _typical_batch(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Audio ``[B, S]`` and samples ``[B]`` of utterances of median length.

    Raises:
        ValueError: none of them is usable.
    """
    by_length = sorted(corpus, key=lambda u: (u.num_samples, u.id))
    start = max(0, (len(by_length) - _UTTERANCES) // 2)
    audio: list[Tensor] = []
    for utterance in by_length[start : start + _UTTERANCES]:
        try:
            audio.append(corpus.audio(utterance)[: int(_CROP_SECONDS * SAMPLE_RATE)])
        except BadAudioError as error:
            corpus.skipped.add(utterance.source, str(error))
    if not audio:
        raise ValueError(f"no audio to measure inference time on in {corpus.name}; Corpus.skipped says why")
    return pad_sequence(audio, batch_first=True), torch.tensor([len(a) for a in audio])


def median_seconds(runs: Mapping[_Key, Callable[[], object]], rounds: int) -> dict[_Key, float]:
    """Median seconds of each call; every round makes all calls, forwards and backwards in turn, the first is not counted."""
    measured: dict[_Key, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key in runs if number % 2 else reversed(list(runs)):
            began = time.perf_counter()
            runs[key]()
            seconds = time.perf_counter() - began
            if number:
                measured[key].append(seconds)
    return {key: statistics.median(seconds) for key, seconds in measured.items()}


def _front_runs(model: Timed, audio: Tensor, lengths: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    device = model.features.window.device
    audio, lengths = audio.to(device), lengths.to(device)
    mel, frames = model.features(audio, lengths)
    mel = mel.to(next(model.encoder.parameters()).dtype)

    def features() -> None:
        model.features(audio, lengths)
        _wait(device)

    def front_end() -> None:
        if model.encoder.front_end is not None:
            model.encoder.front_end(mel, frames)
        _wait(device)

    return features, front_end


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(model: Timed, audio: Tensor, lengths: Tensor, depth: int) -> Callable[[], None]:
    """Compute features; return a call that runs ``depth`` loops of the encoder on them and waits for the result."""
    device = model.features.window.device
    mel, frames = model.features(audio.to(device), lengths.to(device))
    mel = mel.to(next(model.encoder.parameters()).dtype)

    def run() -> None:
        model.encoder(mel, frames, depth=depth)
        _wait(device)

    return run
