"""Training and test speech of the demo, cut to what a few minutes and little memory allow."""

from __future__ import annotations

import numpy as np

from ...data import Corpus, demo_corpus, load_corpus
from ..pretraining.speech import hold_out_speakers

__all__ = ["at_most", "load_demo_speech"]

_TRAIN_MINUTES, _TEST_MINUTES = 60.0, 5.0  # at most


def load_demo_speech(path: str | None, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Load training speech (one hour at most) and test speech (five minutes at most) into memory.

    They are the corpus's splits ``train`` and ``test`` if it has both; otherwise some speakers are held out for the test.

    Args:
        path: see :func:`~lcconformer.data.load_corpus`; None: the speech that comes with the package.
        seed: decides which speakers are held out and which utterances a longer corpus contributes.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`~lcconformer.data.load_corpus`.
        ValueError: there is a single speaker and no splits.
    """
    corpus = demo_corpus() if path is None else load_corpus(path)
    if {"train", "test"} <= set(corpus.splits):
        train, test = corpus.select(splits=["train"]), corpus.select(splits=["test"])
    else:
        held = hold_out_speakers([corpus], seed)
        if not held:
            raise ValueError(
                f"{corpus.name} has one speaker and no splits 'train' and 'test': nothing can be held out for the test; "
                "give speech of two speakers or more, or set the splits in its meta.jsonl"
            )
        train, test = corpus.select(exclude_speakers=held), corpus.select(speakers=held)
    return at_most(train, _TRAIN_MINUTES, seed).preload(), at_most(test, _TEST_MINUTES, seed).preload()


def at_most(corpus: Corpus, minutes: float, seed: int) -> Corpus:
    """Randomly drawn utterances of ``minutes`` minutes at most in total, but at least one utterance."""
    ids: list[str] = []
    seconds = 0.0
    for index in np.random.default_rng(seed).permutation(len(corpus)):
        utterance = corpus[int(index)]
        if ids and seconds + utterance.seconds > 60.0 * minutes:
            break
        ids.append(utterance.id)
        seconds += utterance.seconds
    return corpus.select(ids=ids)
