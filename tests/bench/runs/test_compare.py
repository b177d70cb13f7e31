"""The comparison of two commits: the workers that time them, and the order of the calls."""

import pytest
from lcconformer.bench.core.case import Case
from lcconformer.bench.runs import compare


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_worker_times_calls_of_the_package_on_its_path(mode, tmp_path):
    case = Case(mode, 1, 8, d_model=32, layers=2, depth=2, kernel=7)
    with compare._worker(tmp_path, case) as call:
        assert 0 < call() < 60_000
        assert 0 < call() < 60_000


def test_a_worker_that_dies_is_an_error(tmp_path):
    (tmp_path / "lcconformer.py").write_text("raise SystemExit(3)")
    case = Case("inference", 1, 8, d_model=32, layers=2, depth=2)
    with pytest.raises(ValueError, match="ended with code 3"), compare._worker(tmp_path, case):
        pass


def test_a_worker_that_does_not_end_is_aborted_and_shows_where_it_is(tmp_path, monkeypatch, capfd):
    (tmp_path / "lcconformer.py").write_text(
        "import atexit, time, torch\n"
        "atexit.register(time.sleep, 200)\n"
        "def ConformerConfig(**_): ...\n"
        "class ConformerEncoder(torch.nn.Module):\n"
        "    def __init__(self, _): super().__init__()\n"
        "    def forward(self, x, depth): return (x,)\n"
    )
    monkeypatch.setattr(compare, "_PATIENCE", 1.0)
    with compare._worker(tmp_path, Case("inference", 1, 8, d_model=32, layers=2, depth=2)) as call:
        assert call() >= 0
    assert "Fatal Python error: Aborted" in capfd.readouterr().err


def test_both_commits_are_timed_in_turn():
    order = []
    calls = {name: lambda name=name: (order.append(name), 1.0)[1] for name in ("new", "old")}
    found = compare._interleave(calls, seconds=0.0, rounds=3)
    assert order == ["new", "old", "old", "new", "new", "old"]
    assert found["new"].median == 1.0
