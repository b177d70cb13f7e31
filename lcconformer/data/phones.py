"""Phone labels: one inventory for all corpora, and labels on the grid of 10 ms frames.

The inventory has 40 classes: the 39 phones of CMU's ARPAbet, and silence. Labels are folded into it as follows:

- stress digits are dropped (``AH0 AH1 AH2`` -> ``AH``), and case is ignored;
- all names of silence (``SIL``, ``SP``, ``<SIL>``, empty) -> ``SIL``.

``AO`` and ``ZH`` stay classes of their own. Lee & Hon (IEEE TASSP 37(11), 1989) fold them into ``AA`` and ``SH``, so their
accuracies are not directly comparable. Noise fillers (``+NSN+``, ``SPN`` and the like) are neither phones nor silence: the
phone of their frames is unknown.
"""

from __future__ import annotations

import torch

from .utterance import Utterance

IGNORE = -100
"""Label of a frame whose phone is unknown; the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""

_CLASSES = "SIL AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = tuple(_CLASSES.split(" "))
"""The 40 classes; the number of a class is its index in this tuple."""

_NUMBER = {phone: number for number, phone in enumerate(PHONES)}
_FOLD = {"SP": "SIL", "<SIL>": "SIL", "": "SIL"}
_NOISE = frozenset({"+NSN+", "+SPN+", "+BREATH+", "+COUGH+", "+NOISE+", "+UH+", "+UM+", "SPN", "NSN", "<UNK>"})


_MOST_PAIRS = 1 << 18  # far beyond any corpus; a hostile one must not fill the memory


def fold(label: str) -> int:
    """Class number of an ARPAbet ``label``, or ``IGNORE`` for noise.

    Raises:
        ValueError: the label is neither ARPAbet nor a known noise filler.
    """
    name = label.upper().rstrip("012")
    name = _FOLD.get(name, name)
    if name in _NOISE:
        return IGNORE
    if name not in _NUMBER:
        raise ValueError(f"unknown phone {label!r}: expected ARPAbet ({' '.join(PHONES)}) or a noise filler")
    return _NUMBER[name]


def parse_alignment(
    text: str, known: dict[tuple[str, int], tuple[str, int]] | None = None
) -> tuple[tuple[str, int], ...]:
    """Parse consecutive phones and their numbers of 10 ms frames: ``"SIL:20 W:16"`` -> ``(("SIL", 20), ("W", 16))``.

    Args:
        text: the alignment.
        known: pairs of other alignments, which are used again, and to which those of this one are added: a corpus has millions
            of phones, of which few differ.

    Raises:
        ValueError: an item is not ``PHONE:frames`` with a known phone and a positive number of frames, or more pairs differ
            than in any corpus.
    """
    known = {} if known is None else known
    phones = []
    for item in text.split():
        label, colon, frames = item.rpartition(":")
        if not colon or not frames.isdecimal() or int(frames) == 0:
            raise ValueError(f"alignment item {item!r} is not PHONE:frames with frames > 0")
        fold(label)
        pair = (label, int(frames))
        if len(known) >= _MOST_PAIRS and pair not in known:
            raise ValueError(f"its alignments have over {_MOST_PAIRS} different items; expected a few thousand")
        phones.append(known.setdefault(pair, pair))
    return tuple(phones)


def frame_labels(utterance: Utterance, num_frames: int, start: int = 0) -> torch.Tensor:
    """Classes of the 10 ms frames ``start ... start + num_frames - 1``: int64 ``[num_frames]``, ``IGNORE`` where unknown.

    Frame ``t`` covers samples ``160 t ... 160 t + 159``, the middle of frame ``t`` of ``LogMel``.
    """
    labels = torch.full((num_frames,), IGNORE, dtype=torch.int64)
    position = -start
    for label, frames in utterance.phones or ():
        labels[max(position, 0) : max(position + frames, 0)] = fold(label)
        position += frames
        if position >= num_frames:
            break
    return labels
