"""Targets of speech recognition: phones of the alignments, characters of the transcripts."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import IGNORE, PHONES, Batch, Utterance, fold

__all__ = [
    "BLANK",
    "Targets",
    "alphabet_of",
    "batch_targets",
    "greedy",
    "normalise_text",
    "phone_classes",
    "sentences_of",
]

BLANK = 0
"""Class of CTC's blank.  Among phones it takes the place of silence, which is never a target."""
_SILENCE = PHONES.index("SIL")
_KEPT = frozenset("LMN")  # Unicode's letters, marks and numbers


@dataclass(frozen=True)
class Targets:
    """Targets of a batch of B utterances.

    frames: ``[B, T]`` int64 phone classes of the 10 ms frames, -100 where unknown. phones, characters: ``[B, U]`` int64
    classes from 1 on, padded with 0. phone_counts, character_counts: ``[B]`` int64 classes in each row; 0 where the
    utterance has no alignment or no transcript.
    """

    frames: Tensor
    phones: Tensor
    phone_counts: Tensor
    characters: Tensor
    character_counts: Tensor

    def to(self, device: torch.device | str) -> Targets:
        return Targets(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


def normalise_text(text: str) -> str:
    """Upper case, without punctuation other than apostrophes, words separated by single spaces."""
    kept = (c if c == "'" or unicodedata.category(c)[0] in _KEPT else " " for c in text.upper())
    return " ".join("".join(kept).split())


def alphabet_of(utterances: Iterable[Utterance]) -> str:
    """The characters of the normalised transcripts, sorted; character i is CTC class ``i + 1``."""
    return "".join(sorted({c for u in utterances for c in normalise_text(u.text)}))


def phone_classes(utterance: Utterance) -> list[int]:
    """Classes of the phones of an alignment, without silence and noise; empty if there is none."""
    classes = [fold(label) for label, _ in utterance.phones or ()]
    return [c for c in classes if c not in (_SILENCE, IGNORE)]


def sentences_of(utterances: Iterable[Utterance], units: str) -> list[list[str]]:
    """What is said in ``"phones"`` or ``"characters"``, named as in :meth:`Recogniser.tokens`; without what is unknown."""
    if units == "phones":
        said = [[PHONES[c] for c in phone_classes(u)] for u in utterances]
    else:
        said = [list(normalise_text(u.text).replace(" ", "|")) for u in utterances]
    return [sentence for sentence in said if sentence]


def batch_targets(batch: Batch, utterances: Sequence[Utterance], alphabet: str) -> Targets:
    """Targets of a batch, whose labels are loaded; characters outside ``alphabet`` are left out."""
    number = {c: i for i, c in enumerate(alphabet, 1)}
    phones = [torch.tensor(phone_classes(u), dtype=torch.int64) for u in utterances]
    characters = [
        torch.tensor([number[c] for c in normalise_text(u.text) if c in number], dtype=torch.int64) for u in utterances
    ]
    assert batch.labels is not None
    return Targets(
        batch.labels,
        pad_sequence(phones, batch_first=True),
        torch.tensor([len(p) for p in phones]),
        pad_sequence(characters, batch_first=True),
        torch.tensor([len(c) for c in characters]),
    )


def greedy(logits: Tensor) -> list[int]:
    """Classes on CTC's best path through ``[T, V]``: repetitions merged, blanks dropped."""
    return [c for c in logits.argmax(-1).unique_consecutive().tolist() if c != BLANK]
