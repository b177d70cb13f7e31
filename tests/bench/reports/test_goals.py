"""Goals against rows: met, missed, not measured."""

import pytest
from lcconformer.bench.core.rows import Results
from lcconformer.bench.reports import goals
from lcconformer.bench.reports.goals import Goal

from .test_filing import row


def lines(rows):
    return {line.split("  ")[0]: line.split() for line in goals.table(rows).splitlines()[2:]}


def case(provider, ms, **changes):
    """A training row at (8, 400)."""
    return row(provider, ms, mode="training", **changes)


def test_the_fastest_rows_of_both_sides_count():
    rows = [
        case("eager", 9.0),
        case("compile", 6.0, backend="inductor"),
        case("compile", 5.0, backend="graphs"),
        case("lcconformer", 2.0, backend="triton"),
        case("lcconformer", 2.5, backend="torch"),
    ]
    found = lines(rows)
    assert found["training B=8 T=400 d=256: speed of eager"][-4:] == ["4.50x", "4.50x", "12.5%", "met"]
    assert found["training B=8 T=400 d=256: speed of compile"][-3:] == ["2.50x", "12.5%", "met"]
    assert found["training B=8 T=400 d=512: speed of eager"][-2:] == ["not", "measured"]
    assert not any("transformers" in goal for goal in found), "goals of a CPU"


def test_a_missed_goal_is_said():
    rows = [case("eager", 8.9), case("lcconformer", 2.0, backend="triton")]
    assert lines(rows)["training B=8 T=400 d=256: speed of eager"][-3:] == ["4.45x", "12.5%", "MISSED"]


@pytest.mark.parametrize(("ours", "met"), [(3.5, True), (3.6, False)])
def test_memory_is_to_be_small(ours, met):
    goal = Goal("cuda", "training", 8, 400, 256, "eager", 0.35, memory=True)
    rows = [case("eager", 9.0, peak_memory_mb=10.0), case("lcconformer", 2.0, backend="triton", peak_memory_mb=ours)]
    ratio = goal.measured(rows)
    assert ratio == pytest.approx(ours / 10)
    assert goal.met(ratio) == met


def test_memory_is_that_of_the_fastest_row_that_knows_its_own():
    goal = Goal("cuda", "training", 8, 400, 256, "eager", 0.35, memory=True)
    rows = [
        case("eager", 9.0, peak_memory_mb=10.0),
        case("lcconformer", 1.0, backend="triton+loop+graphs", peak_memory_mb=None),
        case("lcconformer", 2.0, backend="triton+loop", peak_memory_mb=3.0),
    ]
    assert goal.measured(rows) == pytest.approx(0.3)


def test_a_shallow_row_reaches_no_goal():
    rows = [case("eager", 9.0), case("lcconformer", 0.1, backend="triton", depth=3)]
    assert lines(rows)["training B=8 T=400 d=256: speed of eager"][-2:] == ["not", "measured"]


def test_command(tmp_path, capsys):
    assert goals.main([str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    results = Results(tmp_path / "rows.json")
    results.add([case("eager", 9.0), case("lcconformer", 2.0, backend="triton")])
    assert goals.main([str(tmp_path / "rows.json")]) == 0
    assert "goal" in capsys.readouterr().out
