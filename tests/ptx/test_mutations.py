"""Compiled kernels with one wait or barrier taken out: the interpreter notices, or nothing depends on it."""

from __future__ import annotations

import pytest

from .cases import attention, feed_forward

WAITS = r"\n\s*(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)[^\n]*"
FENCES = r"\n\s*fence\.proxy\.async[^\n]*"
BARRIERS = r"\n\s*bar\.sync[^\n]*"
# tails in rows, keys and hidden width, and more steps along K than stages
ATTENTION = attention(64, "bf16", 131)
# whole tiles alone: the loop over them is the last to touch the accumulators
WHOLE_TILES = attention(64, "bf16", 128, lengths=[128, 64])
PRODUCT = feed_forward("bf16", 83, products=2, norm=False, d=264)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("cases", "kernel", "arch", "pattern", "unseen"),
    [
        ([ATTENTION, WHOLE_TILES], "_forward", 90, WAITS, 0),
        ([ATTENTION], "_forward", 90, FENCES, 2),
        # between a thread's own reads and writes of the carried band, in either loop; ahead of copies to a stage whose last
        # reader the barrier of the band waited for; two in a row between the loops, of which one does
        ([ATTENTION], "_forward", 90, BARRIERS, 5),
        ([ATTENTION], "_forward", 80, WAITS, 0),
        ([ATTENTION], "_forward", 80, BARRIERS, 3),
        ([PRODUCT], "_up_kernel", 90, WAITS, 0),
        ([PRODUCT], "_up_kernel", 90, BARRIERS, 1),
    ],
)
def test_what_is_taken_out_is_missed(ask, cases, kernel, arch, pattern, unseen):
    """All waits are, in one case or another; of the barriers at most ``unseen`` order nothing that another one does not."""
    answers = [ask(**case, arch=arch, mutations={"kernel": kernel, "pattern": pattern}) for case in cases]
    for answer in answers:
        assert "fault" not in answer, answer["fault"]
        assert answer["taken_out"], f"{kernel} has no {pattern}"
        assert answer["taken_out"] == answers[0]["taken_out"], "the cases run different code"
    never = set.intersection(*(set(answer["unseen"]) for answer in answers))
    assert len(never) <= unseen, "\n".join(sorted(never))
