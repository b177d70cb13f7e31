"""Hidden states of speech at every depth, from one forward pass per utterance: of drawn frames, or of whole utterances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...data import IGNORE, BadAudioError, Corpus, Utterance, frame_count, frame_labels, plan_batches
from ...data.features import SAMPLE_RATE
from ..model import PretrainingModel

__all__ = [
    "Choice",
    "Sequences",
    "choose_frames",
    "choose_utterances",
    "collect_sequences",
    "collect_states",
    "random_init_like",
    "stream_sequences",
]

_BATCH_SECONDS = 64.0  # most audio of a forward pass, padding included; a longer utterance goes alone
_SPREAD = 4  # the drawn utterances have this many times the frames that are wanted


@dataclass(frozen=True)
class Choice:
    """Encoder outputs drawn from an utterance; positions: ``[F]`` int64, their numbers, ascending."""

    utterance: Utterance
    positions: Tensor


@dataclass(frozen=True)
class Sequences:
    """Hidden states, features and labels of whole utterances, one after another, for an encoder that merges M frames.

    hidden: ``[K, U, D]`` float16, hidden states at K depths of the U encoder outputs. mel: ``[U, M, C]`` float16, the log-mel
    features of the 10 ms frames under each output, zero beyond the end of an utterance. labels: ``[U, M]`` int64 phone classes
    of these frames, -100 where the phone is unknown. spans: ``[U, 2]`` int64, the first and the last output of the utterance
    that each output belongs to.
    """

    hidden: Tensor
    mel: Tensor
    labels: Tensor
    spans: Tensor


def choose_frames(corpus: Corpus, *, max_frames: int, seed: int = 0, step: int = 1) -> list[Choice]:
    """Draw encoder outputs at random, without reading audio.

    First, utterances are drawn until they have four times ``max_frames`` outputs in total; then, outputs are drawn from those
    utterances.  So a small number of outputs needs few forward passes and still comes from several utterances.

    Args:
        corpus: where utterances are drawn from.
        max_frames: largest number of outputs.
        seed: seed of both draws.
        step: number of 10 ms frames that the encoder merges into one output.

    Raises:
        ValueError: no output is left.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[Utterance, int]] = []
    total = 0
    for index in torch.randperm(len(corpus), generator=generator).tolist():
        count = -(-frame_count(corpus[index].num_samples) // step)
        drawn.append((corpus[index], count))
        total += count
        if total >= _SPREAD * max_frames:
            break
    if not total:
        raise ValueError(f"{corpus.name}: no utterance has a frame")
    picked = torch.zeros(total, dtype=torch.bool)
    picked[torch.randperm(total, generator=generator)[:max_frames]] = True
    kept = zip(drawn, picked.split([count for _, count in drawn]))
    return [Choice(utterance, keep.nonzero()[:, 0]) for (utterance, _), keep in kept if keep.any()]


def choose_utterances(corpus: Corpus, *, max_frames: int | None = None, seed: int = 0) -> list[Utterance]:
    """Draw utterances with a phone alignment, in random order, until they have ``max_frames`` frames of 10 ms; None: all.

    Raises:
        ValueError: no utterance has a phone alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Utterance] = []
    total = 0
    for index in torch.randperm(len(corpus), generator=generator).tolist():
        utterance = corpus[index]
        frames = frame_count(utterance.num_samples)
        if not bool((frame_labels(utterance, frames) != IGNORE).any()):
            continue
        drawn.append(utterance)
        total += frames
        if max_frames is not None and total >= max_frames:
            break
    if not drawn:
        raise ValueError(f"{corpus.name}: no utterance has a phone alignment")
    return drawn


@torch.no_grad()
def _encode(
    model: PretrainingModel, corpus: Corpus, utterances: Sequence[Utterance], depth: int
) -> Iterator[tuple[list[int], Tensor, Tensor, list[Tensor]]]:
    """Yield batches: indices into ``utterances``, mel ``[B, T, C]``, frames ``[B]`` and hidden states ``[B, T', D]``.

    Utterances whose audio is unusable are left out with a warning and counted in ``corpus.skipped``.
    """
    device = model.features.window.device
    sizes = [u.num_samples for u in utterances]
    budget = max(int(_BATCH_SECONDS * SAMPLE_RATE), *sizes)
    for plan in plan_batches(sizes, budget=budget):
        batch, audio = [], []
        for index in plan:
            try:
                audio.append(corpus.audio(utterances[index]))
            except BadAudioError as error:
                corpus.skipped.add(utterances[index].source, str(error))
                continue
            batch.append(index)
        if not batch:
            continue
        lengths = torch.tensor([len(a) for a in audio])
        mel, frames = model.features(pad_sequence(audio, batch_first=True).to(device), lengths.to(device))
        dtype = next(model.encoder.parameters()).dtype
        _, _, hidden = model.encoder(mel.to(dtype), frames, depth=max(depth, 1), return_hidden_states=True)
        yield batch, mel, frames, hidden


def collect_states(model: PretrainingModel, corpus: Corpus, choices: Sequence[Choice], depths: Sequence[int]) -> Tensor:
    """Return the hidden states ``[K, F, D]``, float16, of chosen encoder outputs; each utterance is encoded once.

    Args:
        model: the model, in evaluation mode; its device is used.
        corpus: the corpus of the utterances; those whose audio is unusable are left out with a warning.
        choices: result of :func:`choose_frames`.
        depths: K depths from 0 (the input of the first loop) to N.

    Raises:
        ValueError: none of the audio is usable.
    """
    parts = []
    for batch, _, _, hidden in _encode(model, corpus, [c.utterance for c in choices], max(depths)):
        rows = torch.repeat_interleave(torch.tensor([len(choices[i].positions) for i in batch])).to(hidden[0].device)
        positions = torch.cat([choices[i].positions for i in batch]).to(hidden[0].device)
        parts.append(torch.stack([hidden[k][rows, positions].half() for k in depths]))
    if not parts:
        raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")
    return torch.cat(parts, 1)


def stream_sequences(
    model: PretrainingModel, corpus: Corpus, utterances: Sequence[Utterance], depths: Sequence[int]
) -> Iterator[Sequences]:
    """Yield the sequences of whole utterances, one batch at a time; arguments as for :func:`collect_states`."""
    factor = model.config.subsampling_factor
    for batch, mel, frames, hidden in _encode(model, corpus, utterances, max(depths)):
        counts = frames.tolist()
        mels, labels = [], []
        for row, (index, count) in enumerate(zip(batch, counts)):
            missing = -count % factor
            mels.append(F.pad(mel[row, :count], (0, 0, 0, missing)).view(-1, factor, mel.shape[2]))
            track = F.pad(frame_labels(utterances[index], count), (0, missing), value=IGNORE)
            labels.append(track.view(-1, factor))
        outputs = torch.tensor([len(x) for x in labels])
        ends = outputs.cumsum(0)
        spans = torch.stack([ends - outputs, ends - 1], 1).repeat_interleave(outputs, 0)
        states = [torch.cat([hidden[k][row, :n] for row, n in enumerate(outputs.tolist())]).half() for k in depths]
        yield Sequences(
            torch.stack(states), torch.cat(mels).half(), torch.cat(labels).to(mel.device), spans.to(mel.device)
        )


def collect_sequences(
    model: PretrainingModel, corpus: Corpus, utterances: Sequence[Utterance], depths: Sequence[int]
) -> Sequences:
    """Collect in memory what :func:`stream_sequences` yields: about ``2 (K D / M + C)`` bytes per 10 ms frame.

    Raises:
        ValueError: none of the audio is usable.
    """
    factor = model.config.subsampling_factor
    total = sum(-(-frame_count(u.num_samples) // factor) for u in utterances)
    store: Sequences | None = None
    done = 0
    for part in stream_sequences(model, corpus, utterances, depths):
        if store is None:
            # one allocation: joining the parts at the end would need twice the memory
            store = Sequences(
                part.hidden.new_empty(len(depths), total, part.hidden.shape[2]),
                part.mel.new_empty(total, *part.mel.shape[1:]),
                part.labels.new_empty(total, factor),
                part.spans.new_empty(total, 2),
            )
        to = slice(done, done + len(part.labels))
        store.hidden[:, to], store.mel[to], store.labels[to] = part.hidden, part.mel, part.labels
        store.spans[to] = part.spans + done
        done = to.stop
    if store is None:
        raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")
    return Sequences(store.hidden[:, :done], store.mel[:done], store.labels[:done], store.spans[:done])


def random_init_like(model: PretrainingModel, seed: int = 0) -> PretrainingModel:
    """Build the control: the same model with untrained weights, in evaluation mode on the same device."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh = PretrainingModel.from_description(model.describe())
    return fresh.to(model.features.window.device).eval()
