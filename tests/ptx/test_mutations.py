"""Compiled kernels with one wait or barrier taken out: the interpreter notices, or nothing depends on it."""

from __future__ import annotations

import pytest

from .cases import attention, feed_forward

WAITS = r"\n\s*(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)[^\n]*"
FENCES = r"\n\s*fence\.proxy\.async[^\n]*"
BARRIERS = r"\n\s*bar\.sync[^\n]*"
# tails in rows, keys and hidden width, and more steps along K than stages
ATTENTION = attention(64, "bf16", 131)
PRODUCT = feed_forward("bf16", 83, products=2, norm=False, d=264)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("case", "kernel", "arch", "pattern", "unseen"),
    [
        (ATTENTION, "_forward", 90, WAITS, 0),
        (ATTENTION, "_forward", 90, FENCES, 2),
        (ATTENTION, "_forward", 90, BARRIERS, 3),
        (ATTENTION, "_forward", 80, WAITS, 0),
        (ATTENTION, "_forward", 80, BARRIERS, 3),
        (PRODUCT, "_up_kernel", 90, WAITS, 0),
        (PRODUCT, "_up_kernel", 90, BARRIERS, 1),
    ],
)
def test_what_is_taken_out_is_missed(ask, case, kernel, arch, pattern, unseen):
    """All waits are; of the barriers at most ``unseen`` order nothing that another one does not order as well."""
    answer = ask(**case, arch=arch, mutations={"kernel": kernel, "pattern": pattern})
    assert "fault" not in answer, answer["fault"]
    assert answer["taken_out"], f"{kernel} has no {pattern}"
    assert len(answer["unseen"]) <= unseen, "\n".join(answer["unseen"])
