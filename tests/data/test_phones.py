"""The folding is the one that is documented, and labels fall on the right frames."""

import pytest

from lcconformer.data import IGNORE, PHONES, Utterance, fold, frame_labels
from lcconformer.data.phones import parse_alignment


def utterance(alignment: str) -> Utterance:
    return Utterance("u", "s", "", "", 16000, parse_alignment(alignment) or None, "u.flac")


def test_39_phones_and_silence():
    assert len(PHONES) == len(set(PHONES)) == 40
    assert {"SIL", "AO", "ZH"} < set(PHONES)


@pytest.mark.parametrize(
    ("label", "phone"),
    [
        ("AA", "AA"),
        ("AO", "AO"),
        ("AO2", "AO"),
        ("zh", "ZH"),
        ("SH", "SH"),
        ("AH0", "AH"),
        ("sil", "SIL"),
        ("sp", "SIL"),
    ],
)
def test_fold(label, phone):
    assert PHONES[fold(label)] == phone


def test_noise_is_unknown_and_foreign_labels_are_refused():
    assert fold("+NSN+") == fold("spn") == IGNORE
    with pytest.raises(ValueError, match="unknown phone 'Q9': expected ARPAbet"):
        fold("Q9")


@pytest.mark.parametrize("text", ["AA", "AA:", "AA:x", "AA:0", "AA:-3", ":5:", "QQ:3", "AA:1.5"])
def test_bad_alignments_are_refused(text):
    with pytest.raises(ValueError, match=r"not PHONE:frames|unknown phone"):
        parse_alignment(text)


def test_frame_labels():
    u = utterance("SIL:2 AA1:3 +NSN+:1 T:2")
    sil, aa, t = (PHONES.index(p) for p in ("SIL", "AA", "T"))
    whole = [sil, sil, aa, aa, aa, IGNORE, t, t, IGNORE, IGNORE]
    assert frame_labels(u, 10).tolist() == whole
    for start in range(10):
        for num in range(11 - start):
            assert frame_labels(u, num, start).tolist() == whole[start : start + num]


def test_no_alignment_no_labels():
    assert frame_labels(utterance(""), 3).tolist() == [IGNORE] * 3
