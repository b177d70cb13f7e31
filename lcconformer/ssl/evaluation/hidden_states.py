"""Hidden states of frames of speech at every depth, from one forward pass per utterance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import IGNORE, BadAudioError, Corpus, Utterance, frame_count, frame_labels, plan_batches
from ...data.features import SAMPLE_RATE
from ..model import PretrainingModel

__all__ = ["Choice", "States", "choose_frames", "collect_states", "random_init_like", "stream_states"]

_BATCH_SECONDS = 64.0  # most audio of a forward pass, padding included; a longer utterance goes alone
_SPREAD = 4  # the drawn utterances have this many times the frames that are wanted


@dataclass(frozen=True)
class Choice:
    """Frames drawn from an utterance.

    positions: ``[F]`` int64, numbers of the 10 ms frames, ascending. labels: ``[F]`` int64, their phone classes.
    """

    utterance: Utterance
    positions: Tensor
    labels: Tensor


@dataclass(frozen=True)
class States:
    """Hidden states, features and labels of F frames, none of them padding.

    hidden: ``[K, F, D]`` float16, hidden states at K depths. mel: ``[F, C]`` float16, log-mel features of the same 10 ms
    frames. labels: ``[F]`` int64 phone classes, -100 where the phone is unknown.
    """

    hidden: Tensor
    mel: Tensor
    labels: Tensor


def choose_frames(
    corpus: Corpus, *, max_frames: int | None = None, seed: int = 0, step: int = 1, labelled: bool = False
) -> list[Choice]:
    """Draw frames at random, without reading audio.

    First, utterances are drawn until they have four times ``max_frames`` frames in total; then, frames are drawn from those
    utterances.  So a small number of frames needs few forward passes and still comes from several utterances.

    Args:
        corpus: where utterances are drawn from.
        max_frames: largest number of frames; None: all frames of the corpus.
        seed: seed of both draws.
        step: take only every ``step``-th 10 ms frame, for an encoder that merges ``step`` frames into one.
        labelled: take only frames whose phone is known.

    Raises:
        ValueError: no frame is left.
    """
    generator = torch.Generator().manual_seed(seed)
    choices: list[Choice] = []
    total = 0
    for index in torch.randperm(len(corpus), generator=generator).tolist():
        utterance = corpus[index]
        labels = frame_labels(utterance, frame_count(utterance.num_samples))
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[::step] = True
        if labelled:
            keep &= labels != IGNORE
        positions = keep.nonzero()[:, 0]
        if len(positions):
            choices.append(Choice(utterance, positions, labels[positions]))
            total += len(positions)
        if max_frames is not None and total >= _SPREAD * max_frames:
            break
    if not choices:
        need = "no utterance has a phone alignment" if labelled else "no utterance has a frame"
        raise ValueError(f"{corpus.name}: {need}")
    if max_frames is None or total <= max_frames:
        return choices
    picked = torch.zeros(total, dtype=torch.bool)
    picked[torch.randperm(total, generator=generator)[:max_frames]] = True
    kept = []
    for choice, keep in zip(choices, picked.split([len(c.positions) for c in choices])):
        if keep.any():
            kept.append(Choice(choice.utterance, choice.positions[keep], choice.labels[keep]))
    return kept


@torch.no_grad()
def stream_states(
    model: PretrainingModel, corpus: Corpus, choices: Sequence[Choice], depths: Sequence[int]
) -> Iterator[States]:
    """Yield the states of the chosen frames, one batch of utterances at a time; each utterance is encoded once.

    The hidden state of a 10 ms frame is the encoder output that covers it; an output that covers several frames is repeated.
    Utterances whose audio is unusable are left out with a warning and counted in ``corpus.skipped``.

    Args:
        model: the model, in evaluation mode; its device is used.
        corpus: the corpus of the utterances.
        choices: result of :func:`choose_frames`.
        depths: K depths from 0 (the input of the first loop) to N.
    """
    device = model.features.window.device
    factor = model.config.subsampling_factor
    sizes = [c.utterance.num_samples for c in choices]
    budget = max(int(_BATCH_SECONDS * SAMPLE_RATE), *sizes)
    for plan in plan_batches(sizes, budget=budget):
        batch, audio = [], []
        for index in plan:
            try:
                audio.append(corpus.audio(choices[index].utterance))
            except BadAudioError as error:
                corpus.skipped.add(choices[index].utterance.source, str(error))
                continue
            batch.append(choices[index])
        if not batch:
            continue
        lengths = torch.tensor([len(a) for a in audio])
        mel, frames = model.features(pad_sequence(audio, batch_first=True).to(device), lengths.to(device))
        dtype = next(model.encoder.parameters()).dtype
        _, _, hidden = model.encoder(mel.to(dtype), frames, depth=max(*depths, 1), return_hidden_states=True)
        rows = torch.repeat_interleave(torch.tensor([len(c.positions) for c in batch])).to(device)
        positions = torch.cat([c.positions for c in batch]).to(device)
        yield States(
            torch.stack([hidden[k][rows, positions // factor] for k in depths]).half(),
            mel[rows, positions].half(),
            torch.cat([c.labels for c in batch]).to(device),
        )


def collect_states(model: PretrainingModel, corpus: Corpus, choices: Sequence[Choice], depths: Sequence[int]) -> States:
    """Collect in memory what :func:`stream_states` yields: ``2 (K D + C)`` bytes per frame.

    Raises:
        ValueError: none of the audio is usable.
    """
    total = sum(len(c.positions) for c in choices)
    store: States | None = None
    done = 0
    for part in stream_states(model, corpus, choices, depths):
        if store is None:
            # one allocation: joining the parts at the end would need twice the memory
            store = States(
                part.hidden.new_empty(len(depths), total, part.hidden.shape[2]),
                part.mel.new_empty(total, part.mel.shape[1]),
                part.labels.new_empty(total),
            )
        to = slice(done, done + len(part.labels))
        store.hidden[:, to], store.mel[to], store.labels[to] = part.hidden, part.mel, part.labels
        done = to.stop
    if store is None:
        raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")
    return States(store.hidden[:, :done], store.mel[:done], store.labels[:done])


def random_init_like(model: PretrainingModel, seed: int = 0) -> PretrainingModel:
    """Build the control: the same model with untrained weights, in evaluation mode on the same device."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh = PretrainingModel.from_description(model.describe())
    return fresh.to(model.features.window.device).eval()
