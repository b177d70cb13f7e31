"""CTC beam search with a language model, by flashlight-text (Kahn et al. 2022, arXiv 2201.12465)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...validation import need_integer, need_number
from .units import BLANK

__all__ = ["BeamSearch", "require_flashlight"]

_LARGEST = 1e3  # nats
_BEHIND = 25.0  # nats by which a path may be worse than the best one
_LIKELIEST = 16  # classes of an output that a path may go on with: more of them cost time and change nothing


@dataclass(frozen=True)
class BeamSearch:
    """Search for the classes with the highest score: the acoustic model's and the language model's together.

    The score of a path is the sum of its log posteriors and ``weight`` times the log10 probability that an n-gram model gives
    to the classes on it, the end included.

    Attributes:
        tokens: what the language model calls the classes (:meth:`Recogniser.tokens`); the first one is CTC's blank.
        lm: file of the language model over these tokens, in ARPA's or in KenLM's binary format.
        weight: weight of the language model; 0: none.
        blank_penalty: taken off the log posterior of the blank, in nats; makes up for the deletions that a language model
            brings.
        beam: number of paths that are kept, of those at most 25 nats behind the best one.

    Raises:
        ImportError: flashlight-text is not installed.
        FileNotFoundError: there is no such file.
        ValueError: a value out of range, or the file is no language model.
    """

    tokens: tuple[str, ...]
    lm: str | os.PathLike[str]
    weight: float = 1.0
    blank_penalty: float = 0.0
    beam: int = 32

    def __post_init__(self) -> None:
        need_number("BeamSearch", "weight", self.weight, 0)
        need_number("BeamSearch", "blank_penalty", self.blank_penalty, -_LARGEST, below=_LARGEST)
        need_integer("BeamSearch", "beam", self.beam, 1, 1 << 16)
        _language_model(self.tokens, str(self.lm))  # says now what is wrong with it

    def __call__(self, logits: Tensor) -> list[int]:
        """Return the classes that are found in ``logits [T, V]``, blanks and repetitions dropped."""
        if not len(logits):
            return []
        scores = logits.float().log_softmax(-1)
        scores[:, BLANK] -= self.blank_penalty
        scores = scores.cpu().contiguous()
        best = self._decoder.decode(scores.data_ptr(), *scores.shape)[0]
        # a token for each output, and one more on either side
        path = best.tokens[1:-1]
        return [c for place, c in enumerate(path) if c > BLANK and (place == 0 or c != path[place - 1])]

    @functools.cached_property
    def _decoder(self) -> Any:
        flashlight = require_flashlight()
        options = flashlight.LexiconFreeDecoderOptions(
            beam_size=self.beam,
            beam_size_token=min(_LIKELIEST, len(self.tokens)),
            beam_threshold=_BEHIND,
            lm_weight=self.weight,
            sil_score=0.0,
            log_add=False,
            criterion_type=flashlight.CriterionType.CTC,
        )
        lm = _language_model(self.tokens, str(self.lm))
        return flashlight.LexiconFreeDecoder(options, lm, BLANK, BLANK, [])


def require_flashlight() -> Any:
    """flashlight-text's decoders.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from flashlight.lib.text import decoder
    except ImportError as error:
        raise ImportError('beam search needs flashlight-text: pip install "lcconformer[beam]"') from error
    return decoder


@functools.lru_cache(maxsize=4)
def _language_model(tokens: Sequence[str], file: str) -> Any:
    require_flashlight()
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    if not Path(file).is_file():
        raise FileNotFoundError(f"no language model at {file}")
    try:
        return KenLM(file, Dictionary(list(tokens)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is no language model in ARPA's or KenLM's format ({error})") from error
