"""Phone labels: one folded inventory for every corpus, and their place on the 10 ms frame grid.

The inventory is the 39 phones of CMU's ARPAbet plus silence: 40 classes. What is folded, exactly:

- stress digits go (``AH0 AH1 AH2`` -> ``AH``) and case does not matter;
- every silence name (``SIL``, ``SP``, ``<SIL>``, empty) -> ``SIL``.

``AO`` and ``ZH`` stay apart (Lee & Hon, IEEE TASSP 37(11), 1989, fold them into ``AA`` and ``SH``: compare accuracies with
theirs accordingly). Noise fillers (``+NSN+``, ``SPN`` and the like) are neither a phone nor silence: their frames are unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .corpora import Utterance

IGNORE = -100
"""Label of a frame whose phone is unknown; the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""

_CLASSES = "SIL AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = tuple(_CLASSES.split(" "))
"""The 40 classes; a class's number is its place here."""

_NUMBER = {phone: number for number, phone in enumerate(PHONES)}
_FOLD = {"SP": "SIL", "<SIL>": "SIL", "": "SIL"}
_NOISE = frozenset({"+NSN+", "+SPN+", "+BREATH+", "+COUGH+", "+NOISE+", "+UH+", "+UM+", "SPN", "NSN", "<UNK>"})


def fold(label: str) -> int:
    """Number of the class of an ARPAbet ``label``, or ``IGNORE`` for noise.

    Raises:
        ValueError: the label belongs to no phone set known here.
    """
    name = label.upper().rstrip("012")
    name = _FOLD.get(name, name)
    if name in _NOISE:
        return IGNORE
    if name not in _NUMBER:
        raise ValueError(f"unknown phone {label!r}: expected ARPAbet ({' '.join(PHONES)}) or a noise filler")
    return _NUMBER[name]


def parse_alignment(text: str) -> tuple[tuple[str, int], ...]:
    """``"SIL:20 W:16"`` -> ``(("SIL", 20), ("W", 16))``: consecutive phones and their numbers of 10 ms frames.

    Raises:
        ValueError: an item is not ``PHONE:frames`` with a known phone and a positive number of frames.
    """
    phones = []
    for item in text.split():
        label, colon, frames = item.rpartition(":")
        if not colon or not frames.isdecimal() or int(frames) == 0:
            raise ValueError(f"alignment item {item!r} is not PHONE:frames with frames > 0")
        fold(label)
        phones.append((label, int(frames)))
    return tuple(phones)


def frame_labels(utterance: Utterance, num_frames: int, start: int = 0) -> torch.Tensor:
    """Class of each 10 ms frame ``start ... start + num_frames - 1``: int64 ``[num_frames]``, ``IGNORE`` where unknown.

    Frame ``t`` covers samples ``160 t ... 160 t + 159``, which are the middle of frame ``t`` of ``LogMel``.
    """
    labels = torch.full((num_frames,), IGNORE, dtype=torch.int64)
    position = -start
    for label, frames in utterance.phones or ():
        labels[max(position, 0) : max(position + frames, 0)] = fold(label)
        position += frames
        if position >= num_frames:
            break
    return labels
