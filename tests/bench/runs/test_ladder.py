"""The ladder: factors, their product, and the depth of shallow inference."""

import pytest
from lcconformer.bench.core.case import Case
from lcconformer.bench.runs import ladder


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_ladder_multiplies_up(mode, capsys):
    case = Case(mode, 1, 8, d_model=32, layers=3, depth=3, kernel=7)
    rungs = ladder.climb(case, depth=2, seconds=0.0, rounds=2)
    assert any(f"({backend} backend)" in rungs[1].name for backend in ("torch", "cpu"))
    assert len(rungs) == 4
    lines = ladder._lines(rungs)
    product = 1.0
    for (_, _, factor, total, saved), rung in zip(lines, rungs):
        product *= float(factor[:-1])
        assert float(total[:-1]) == pytest.approx(rungs[0].ms / rung.ms, abs=0.006)
        assert float(total[:-1]) == pytest.approx(product, rel=0.05)
        assert float(saved[:-1]) == pytest.approx(100 * (1 - rung.ms / rungs[0].ms), abs=0.06)


def test_shallow_depth_saves_what_the_paper_saves():
    assert [ladder.shallow_depth(n) for n in (1, 8, 12, 16)] == [1, 5, 8, 10]
