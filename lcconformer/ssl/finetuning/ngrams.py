"""N-gram language models of phones or characters, estimated from a little text and written for a beam search."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...runtime import write_atomically
from ...validation import need_integer

__all__ = ["ORDERS", "write_ngrams"]

_START, _END, _UNKNOWN = "<s>", "</s>", "<unk>"
_NEVER = -99.0  # log10 probability of what cannot come: a start, an unknown token
ORDERS = range(2, 7)
"""What flashlight-text's KenLM reads."""


def write_ngrams(path: str | os.PathLike[str], sentences: Iterable[Sequence[str]], order: int) -> Path:
    """Estimate a language model and write it in ARPA's format.

    Interpolated Witten-Bell smoothing (Chen and Goodman 1999, section 2.5), which needs no held-out text: a history h that was
    seen c(h) times, followed by t(h) different tokens, leaves t(h) / (c(h) + t(h)) of its probability to the history without
    its first token; single tokens leave theirs to the uniform law over all of them and the end.

    Args:
        path: file to be written.
        sentences: sequences of tokens, which are words without white space.
        order: n, 2 ... 6.

    Raises:
        ValueError: there is no token, a token is empty, has white space or is one of ARPA's own, or the order is out of range.
        OSError: the file cannot be written.
    """
    need_integer("write_ngrams", "order", order, ORDERS[0], ORDERS[-1])
    following: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        for token in sentence:
            if token.split() != [token] or token in (_START, _END, _UNKNOWN):
                raise ValueError(f"write_ngrams: {token!r} is no token; expected a word without white space")
        marked = [_START, *sentence, _END]
        for place in range(1, len(marked)):
            for length in range(min(order, place + 1)):
                following[tuple(marked[place - length : place])][marked[place]] += 1
    tokens = sorted({*following[()]} - {_END})
    if not tokens:
        raise ValueError("write_ngrams: the text has no token; give some sentences")

    known: dict[tuple[str, ...], float] = {}
    left = {h: len(counts) / (counts.total() + len(counts)) for h, counts in following.items()}
    for history in sorted(following, key=len):
        counts = following[history]
        for token, count in counts.items():
            shorter = (*history[1:], token)
            lower = known[shorter] if history else 1.0 / (len(tokens) + 1)
            gram = (*history, token)
            known[gram] = count / (counts.total() + len(counts)) + left[history] * lower

    lines: list[list[str]] = [[] for _ in range(order)]
    for gram, probability in sorted(known.items()):
        lines[len(gram) - 1].append(_line(math.log10(probability), gram, left.get(gram)))
    lines[0] += [_line(_NEVER, (_START,), left.get((_START,))), _line(_NEVER, (_UNKNOWN,), None)]
    sizes = "".join(f"ngram {n}={len(found)}\n" for n, found in enumerate(lines, 1))
    parts = "".join(f"\n\\{n}-grams:\n" + "\n".join(found) + "\n" for n, found in enumerate(lines, 1))
    return write_atomically(path, f"\\data\\\n{sizes}{parts}\n\\end\\\n")


def _line(logarithm: float, gram: tuple[str, ...], left: float | None) -> str:
    backoff = "" if left is None else f"\t{math.log10(left):.7f}"
    return f"{logarithm:.7f}\t{' '.join(gram)}{backoff}"
