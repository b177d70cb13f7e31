"""What is known of one utterance of a corpus, its samples aside."""

from __future__ import annotations

from dataclasses import dataclass

from .features import SAMPLE_RATE

__all__ = ["Utterance"]


@dataclass(frozen=True)
class Utterance:
    """One utterance.

    Attributes:
        id, speaker, split, text: as in the corpus.
        num_samples: length at 16 kHz.
        phones: pairs (label, number of 10 ms frames) from the start, or None.
        source: name of its file within the corpus.
    """

    id: str
    speaker: str
    split: str
    text: str
    num_samples: int
    phones: tuple[tuple[str, int], ...] | None
    source: str

    @property
    def seconds(self) -> float:
        return self.num_samples / SAMPLE_RATE
