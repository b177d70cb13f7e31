"""Speech of a reproduction: who trains, who chooses the depth, who is tested, and the same test in noise."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...data import Corpus, Utterance, load_corpus
from ..masking import utterance_rng
from ..pretraining.checkpoints import fingerprint
from ..pretraining.speech import JoinedCorpus, hold_out_speakers

__all__ = ["NOISE_DECIBELS", "NoisyCorpus", "ReproductionSpeech", "load_reproduction_speech"]

NOISE_DECIBELS = 10.0
"""Power of the speech over that of the white noise in the noisy test."""
_PRELOAD_HOURS = 10.0


@dataclass(frozen=True)
class ReproductionSpeech:
    """Speech by role; no speaker has two. ``pretraining`` is ``train``, with more speech if there is."""

    train: Corpus
    validation: Corpus
    test: Corpus
    pretraining: Corpus

    @property
    def aligned(self) -> bool:
        """Whether phones are known: of speech to train on and of speech to test on."""
        return all(any(u.phones for u in corpus) for corpus in (self.train, self.validation, self.test))

    @property
    def speakers(self) -> dict[str, str]:
        """Speaker of each test utterance."""
        return {u.id: u.speaker for u in self.test}

    def describe(self) -> dict[str, dict[str, object]]:
        """Facts for the report, without the places of files."""
        parts = ("train", "validation", "test", "pretraining")
        return {name: _describe(getattr(self, name)) for name in parts}


def _describe(corpus: Corpus) -> dict[str, object]:
    speakers = corpus.speakers
    return {
        "corpus": " + ".join(os.path.basename(os.path.normpath(part)) for part in corpus.name.split(" + ")),
        "utterances": len(corpus),
        "hours": round(corpus.hours, 3),
        "speakers": len(speakers),
        "named": list(speakers) if len(speakers) <= 8 else [],
        "fingerprint": fingerprint(corpus),
    }


class NoisyCorpus(Corpus):
    """The same utterances in white noise, which is a function of the utterance's id."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__(corpus.name, list(corpus), corpus._files, corpus.skipped)
        self._clean = corpus

    def audio(self, utterance: Utterance) -> torch.Tensor:
        audio = self._clean.audio(utterance)
        noise = utterance_rng(0, 0, utterance.id).standard_normal(len(audio), dtype=np.float32)
        size = float(audio.square().mean().sqrt()) * 10.0 ** (-NOISE_DECIBELS / 20.0)
        return audio + size * torch.from_numpy(noise)


def load_reproduction_speech(
    paths: Sequence[str],
    *,
    test_speakers: Collection[str] = (),
    validation_speakers: Collection[str] = (),
    more: Sequence[str] = (),
    seed: int = 0,
) -> ReproductionSpeech:
    """Load speech and separate it by role.

    With ``test_speakers``, splits do not count.  Without, the splits whose name begins with ``test`` are the test and those
    that begin with ``dev`` or ``val`` the validation (of LibriSpeech, ``test-other`` and ``dev-other`` are left out).
    Where nothing says who validates, some speakers with 5% of the training speech do.

    Args:
        paths: corpora, see :func:`lcconformer.data.load_corpus`.
        test_speakers, validation_speakers: speakers of these roles.
        more: corpora that pretraining uses besides, without the speakers of the other roles.
        seed: seed of the draw of validation speakers.

    Raises:
        FileNotFoundError, ValueError, ImportError: see ``load_corpus``.
        ValueError: a speaker that no corpus has or that has two roles, or a role that nobody is left for.
    """
    corpora = [load_corpus(path) for path in paths]
    known = {s for c in corpora for s in c.speakers}
    for what, named in (("test", test_speakers), ("validation", validation_speakers)):
        if unknown := sorted(set(named) - known):
            raise ValueError(f"no {what} speaker {', '.join(unknown)} in {', '.join(paths)}; there are: {_some(known)}")
    if both := sorted(set(test_speakers) & set(validation_speakers)):
        raise ValueError(f"speaker {', '.join(both)} is named for the test and for validation; choose one")

    def role(utterance: Utterance) -> str:
        split = utterance.split.lower()
        if test_speakers:
            if utterance.speaker in test_speakers:
                return "test"
        elif split.startswith(("test", "dev", "val")) and split.endswith("-other"):
            return "left out"
        elif split.startswith("test"):
            return "test"
        elif split.startswith(("dev", "val")) and not validation_speakers:
            return "validation"
        return "validation" if utterance.speaker in validation_speakers else "train"

    def pick(wanted: str) -> list[Corpus]:
        ids = [[u.id for u in corpus if role(u) == wanted] for corpus in corpora]
        return [corpus.select(ids=mine) for corpus, mine in zip(corpora, ids) if mine]

    parts = {name: pick(name) for name in ("train", "validation", "test")}
    if not parts["test"]:
        raise ValueError(
            f"nobody is left for the test: {', '.join(paths)} has no split 'test'; name --test-speakers, some of "
            f"{_some(known)}"
        )
    if parts["train"] and not parts["validation"]:
        held = hold_out_speakers(parts["train"], seed)
        parts["validation"] = [
            c.select(speakers=set(held) & set(c.speakers)) for c in parts["train"] if set(held) & set(c.speakers)
        ]
        rest = [(c, set(c.speakers) - set(held)) for c in parts["train"]]
        parts["train"] = [c.select(speakers=speakers) for c, speakers in rest if speakers]
    for name in ("train", "validation"):
        if not parts[name]:
            raise ValueError(
                f"nobody is left for {'training' if name == 'train' else name} in {', '.join(paths)}; it takes three "
                f"speakers at least, one a role: there are {_some(known)}"
            )
    tested = {s for name in ("test", "validation") for c in parts[name] for s in c.speakers}
    shared = sorted(tested & {s for c in parts["train"] for s in c.speakers})
    if shared:
        raise ValueError(f"speaker {', '.join(shared)} would train and be tested: name --test-speakers")
    others = [load_corpus(path) for path in more]
    others = [c.select(exclude_speakers=tested & set(c.speakers)) for c in others]
    if sum(c.hours for c in (*others, *(c for part in parts.values() for c in part))) <= _PRELOAD_HOURS:
        parts = {name: [c.preload() for c in part] for name, part in parts.items()}
        others = [c.preload() for c in others]
    train, validation, test = (_join(parts[name]) for name in ("train", "validation", "test"))
    return ReproductionSpeech(train, validation, test, _join([*parts["train"], *others]) if others else train)


def _join(parts: list[Corpus]) -> Corpus:
    return parts[0] if len(parts) == 1 else JoinedCorpus(parts)


def _some(names: Collection[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:30]) + (f" and {len(first) - 30} more" if len(first) > 30 else "")
