"""Every shipped kernel as compiled for a GPU, executed on a CPU: through the ops, against float64, without a race."""

from __future__ import annotations

import pytest

from .cases import ARCHITECTURES, EVERYTHING, UNCOVERED, cuda_cases, name_of, quick_cases


def check(answer: dict) -> None:
    """The doctor's rule for every tensor; a race or an access out of bounds comes as a fault."""
    assert "fault" not in answer, answer["fault"]
    wrong = {n: t for n, t in answer["tensors"].items() if not t["passed"]}
    assert not wrong, wrong
    assert answer["launches"]


@pytest.mark.parametrize("case", list(quick_cases()), ids=name_of)
def test_some(ask, case):
    check(ask(**case))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYTHING, ids=name_of)
def test_shipped(ask, case):
    check(ask(**case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [{**c, "arch": a} for a in ARCHITECTURES for c in cuda_cases()], ids=name_of)
def test_cuda(ask, cuda_kernels, case):
    check(ask(**case, **cuda_kernels(case["arch"])))


def test_the_cases_launch_every_shipped_configuration(ask):
    """A kernel, tile or dtype that ships needs a case in ``cases.py``, or a reason in UNCOVERED."""
    missing = ask(uncovered=EVERYTHING)
    assert "fault" not in missing, missing["fault"]
    assert missing == {str(arch): UNCOVERED for arch in ARCHITECTURES}
