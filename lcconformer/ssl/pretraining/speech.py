"""Training speech, and validation speech of held-out speakers, from any number of corpora."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import torch

from ...data import Corpus, Utterance, load_corpus

__all__ = ["JoinedCorpus", "hold_out_speakers", "load_speech"]

_PRELOAD_HOURS = 10.0  # of speech are decoded once and kept, 115 MB an hour; more than that is decoded whenever needed
_HELD_OUT = 0.05  # part of the speech


class JoinedCorpus(Corpus):
    """Several corpora as one; an utterance id that occurs again is prefixed with the number of its corpus."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        skipped = corpora[0].skipped
        for other in corpora[1:]:
            skipped.update(other.skipped)
        self._origin: dict[str, tuple[Corpus, Utterance]] = {}
        utterances = []
        for number, corpus in enumerate(corpora):
            for utterance in corpus:
                own = utterance
                if own.id in self._origin:
                    own = dataclasses.replace(utterance, id=f"{number}/{utterance.id}")
                self._origin[own.id] = (corpus, utterance)
                utterances.append(own)
        super().__init__(" + ".join(c.name for c in corpora), utterances, corpora[0]._files, skipped)

    def audio(self, utterance: Utterance) -> torch.Tensor:
        corpus, original = self._origin[utterance.id]
        return corpus.audio(original)

    def select(self, **wanted: Collection[str] | None) -> Corpus:
        """Not supported: select from the corpora before they are joined.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name}: joined corpora cannot be selected from; select from each, then join them")

    def preload(self, workers: int = 2) -> Corpus:
        """Not supported: preload the corpora before they are joined.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name}: joined corpora cannot be preloaded; preload each, then join them")


def hold_out_speakers(corpora: Sequence[Corpus], seed: int = 0) -> tuple[str, ...]:
    """Draw speakers at random until they have 5% of the speech; of a single speaker, none."""
    speech: dict[str, int] = {}
    for corpus in corpora:
        for utterance in corpus:
            speech[utterance.speaker] = speech.get(utterance.speaker, 0) + utterance.num_samples
    order = np.random.default_rng(seed).permutation(sorted(speech)).tolist()
    held: list[str] = []
    while len(held) < len(order) - 1 and sum(speech[s] for s in held) < _HELD_OUT * sum(speech.values()):
        held.append(order[len(held)])
    return tuple(held)


def load_speech(
    paths: Sequence[str],
    *,
    splits: Collection[str] = (),
    exclude_speakers: Collection[str] = (),
    validation_speakers: Collection[str] | None = None,
    seed: int = 0,
) -> tuple[Corpus, Corpus | None]:
    """Load training and validation speech; the latter is None if nobody is held out.

    Args:
        paths: corpora, see :func:`lcconformer.data.load_corpus`.
        splits: take only these splits; empty: all.
        exclude_speakers: leave these speakers out of both.
        validation_speakers: hold these speakers out for validation; None: those that :func:`hold_out_speakers` draws.
        seed: seed of that draw.

    Raises:
        FileNotFoundError, ValueError, ImportError: see ``load_corpus``.
        ValueError: a speaker or split that no corpus has, or a selection that leaves nothing to train on.
    """
    corpora = [load_corpus(path) for path in paths]
    known_speakers = sorted({s for c in corpora for s in c.speakers})
    known_splits = sorted({s for c in corpora for s in c.splits})
    for what, wanted, known in (
        ("split", splits, known_splits),
        ("speaker", [*exclude_speakers, *(validation_speakers or ())], known_speakers),
    ):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(f"no {what} {', '.join(unknown)} in {', '.join(paths)}; there are: {', '.join(known)}")
    both = sorted(set(exclude_speakers) & set(validation_speakers or ()))
    if both:
        raise ValueError(f"speaker {', '.join(both)} is both excluded and held out for validation; choose one")

    def pick(speakers: Collection[str]) -> list[Corpus]:
        picked = []
        for corpus in corpora:
            ours = set(corpus.speakers) & set(speakers)
            theirs = set(corpus.splits) & set(splits or corpus.splits)
            if any(u.speaker in ours and u.split in theirs for u in corpus):
                picked.append(corpus.select(speakers=ours, splits=theirs))
        return picked

    usable = pick(set(known_speakers) - set(exclude_speakers))
    if validation_speakers is None:
        validation_speakers = hold_out_speakers(usable, seed)
    train = pick(set(known_speakers) - set(exclude_speakers) - set(validation_speakers))
    if not train:
        raise ValueError(
            f"no speech is left to train on: {len(known_speakers)} speakers, of which {len(set(exclude_speakers))} excluded "
            f"and {len(set(validation_speakers))} held out; leave some for training"
        )
    validation = pick(validation_speakers)
    keep = sum(c.hours for c in [*train, *validation]) <= _PRELOAD_HOURS

    def join(parts: list[Corpus]) -> Corpus:
        parts = [c.preload() for c in parts] if keep else parts
        return parts[0] if len(parts) == 1 else JoinedCorpus(parts)

    return join(train), join(validation) if validation else None
