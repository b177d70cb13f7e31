"""Inference time at every depth, measured so that drift of the machine falls on all depths alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data import BadAudioError, Corpus
from ..data.features import SAMPLE_RATE
from .model import PretrainingModel

__all__ = ["DepthTimes", "time_depths"]

_UTTERANCES, _CROP_SECONDS = 8, 15.0


@dataclass(frozen=True)
class DepthTimes:
    """seconds: median wall time of the encoder by depth. utterances, audio_seconds: of the batch, padding not counted.
    rounds: measurements a depth. threads: of torch."""

    seconds: dict[int, float]
    utterances: int
    audio_seconds: float
    rounds: int
    threads: int


@torch.no_grad()
def time_depths(model: PretrainingModel, corpus: Corpus, depths: Sequence[int], *, rounds: int = 9) -> DepthTimes:
    """Time the encoder, from log-mel features to hidden state, on one batch of a corpus's utterances of median length.

    Every round runs all depths, in alternating order, after one round that is not counted.

    Args:
        model: in evaluation mode; its device is used.
        corpus: of the utterances; up to 8, cropped to 15 s.
        depths: 1 ... N.
        rounds: measurements a depth.

    Raises:
        ValueError: none of those utterances is usable.
    """
    device = model.features.window.device
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
    lengths = torch.tensor([len(a) for a in audio], device=device)
    mel, frames = model.features(pad_sequence(audio, batch_first=True).to(device), lengths)
    mel = mel.to(next(model.encoder.parameters()).dtype)

    def once(depth: int) -> float:
        began = time.perf_counter()
        model.encoder(mel, frames, depth=depth)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    measured: dict[int, list[float]] = {depth: [] for depth in depths}
    for number in range(rounds + 1):
        for depth in depths if number % 2 else reversed(depths):
            seconds = once(depth)
            if number:
                measured[depth].append(seconds)
    return DepthTimes(
        {depth: statistics.median(times) for depth, times in measured.items()},
        len(audio),
        float(lengths.sum()) / SAMPLE_RATE,
        rounds,
        torch.get_num_threads(),
    )
