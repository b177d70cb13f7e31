"""Inference time at every depth, measured such that drift of the machine affects all depths and models alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import BadAudioError, Corpus
from ...data.features import SAMPLE_RATE
from ..model import PretrainingModel

__all__ = ["DepthTimes", "time_depths"]

_UTTERANCES, _CROP_SECONDS = 8, 15.0


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
    models: Mapping[str, PretrainingModel], corpus: Corpus, depths: Sequence[int], *, rounds: int = 9
) -> dict[str, DepthTimes]:
    """Time encoders, from log-mel features to hidden states, on one batch of utterances of median length.

    Every round runs all depths of all models, forwards and backwards in turn.  A first round is not counted.

    Args:
        models: models by name, in evaluation mode; their devices are used.
        corpus: where the utterances come from: up to 8, cropped to 15 s.
        depths: depths from 1 to N.
        rounds: measurements per depth.

    Raises:
        ValueError: none of those utterances is usable.
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
    lengths = torch.tensor([len(a) for a in audio])
    batch = pad_sequence(audio, batch_first=True)
    runs = {(name, depth): _run(model, batch, lengths, depth) for name, model in models.items() for depth in depths}
    measured: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key in runs if number % 2 else reversed(runs):
            began = time.perf_counter()
            runs[key]()
            seconds = time.perf_counter() - began
            if number:
                measured[key].append(seconds)
    return {
        name: DepthTimes(
            {depth: statistics.median(measured[name, depth]) for depth in depths},
            len(audio),
            float(lengths.sum()) / SAMPLE_RATE,
            rounds,
            torch.get_num_threads(),
        )
        for name in models
    }


def _run(model: PretrainingModel, audio: Tensor, lengths: Tensor, depth: int) -> Callable[[], None]:
    """Compute features; return a call that runs ``depth`` loops of the encoder on them and waits for the result."""
    device = model.features.window.device
    mel, frames = model.features(audio.to(device), lengths.to(device))
    mel = mel.to(next(model.encoder.parameters()).dtype)

    def run() -> None:
        model.encoder(mel, frames, depth=depth)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
