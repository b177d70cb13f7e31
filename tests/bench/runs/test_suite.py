"""From case to rows: who is skipped, who is refused, what an interruption keeps."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest
from lcconformer.bench.core.case import Case
from lcconformer.bench.core.rows import Results, Row
from lcconformer.bench.providers import registry
from lcconformer.bench.runs import suite

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)
FIELDS = [
    *("provider", "backend", "mode", "batch", "frames", "d_model", "layers", "depth", "dtype", "device", "device_name"),
    *("versions", "commit", "median_ms", "p20_ms", "p80_ms", "tokens_per_s", "rtf", "peak_memory_mb", "tflops"),
    *("gb_per_s", "percent_of_roofline", "speedup_vs_eager", "beside"),
]


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    from lcconformer.bench.core.roofline import Ceilings

    monkeypatch.setattr(suite, "measure_ceilings", lambda case: Ceilings(0.1, 10.0))


def some(names):
    return registry.choose(names)


def test_rows_have_exactly_the_documented_fields(tmp_path):
    path = tmp_path / "out.json"
    run = suite.run_case(SMALL, some("eager,lcconformer:torch"), Results(path), depths=(2, 1), rounds=2)
    written = json.loads(path.read_text())["rows"]
    assert [list(row) for row in written] == [FIELDS] * 3
    assert [(r.provider, r.depth) for r in run] == [("eager", 2), ("lcconformer", 2), ("lcconformer", 1)]
    for row in run:
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.tokens_per_s == pytest.approx(18 / row.median_ms * 1e3)
        assert row.rtf == pytest.approx(row.median_ms / 1e3 / 0.18)
        assert row.speedup_vs_eager == pytest.approx(run[0].median_ms / row.median_ms)
        assert 0 < row.percent_of_roofline < 100
        assert row.peak_memory_mb > 0
    # one loop of two: half of all that is not the projection of positions
    assert run[1].tflops * run[1].median_ms < 2 * run[2].tflops * run[2].median_ms


def test_a_wrong_provider_gets_no_row_and_a_line(tmp_path):
    def build(case):
        module = registry.eager.build(case)
        module.register_forward_hook(lambda module, args, out: 1.01 * out)
        return module

    wrong = dataclasses.replace(registry.eager, name="mutant", build=build)
    said, results = [], Results(tmp_path / "out.json")
    rows = suite.run_case(SMALL, [registry.eager, wrong], results, rounds=1, say=said.append)
    assert [row.provider for row in rows] == ["eager"]
    assert len(said) == 1
    assert "WRONG    mutant:torch" in said[0]
    assert "no time is given" in said[0]
    assert results.skipped[0]["reason"].startswith("wrong: output 0 is off by")


def test_a_provider_that_breaks_does_not_stop_the_others():
    def build(case):
        raise RuntimeError("no such thing\nmore")

    broken = dataclasses.replace(registry.eager, name="broken", build=build)
    said = []
    rows = suite.run_case(SMALL, [broken, registry.eager], Results(), rounds=1, say=said.append)
    assert [row.provider for row in rows] == ["eager"]
    assert said == [f"FAILED   broken:torch on {SMALL}: RuntimeError: no such thing"]


def test_who_cannot_take_part_is_told_once():
    said, results = [], Results()
    for frames in (8, 9):
        suite.run_case(SMALL.replace(frames=frames), some("eager,compile:graphs"), results, rounds=1, say=said.append)
    assert said == ["skipped  compile:graphs: needs a CUDA device"]


def test_no_row_under_the_name_of_a_backend_that_did_not_run():
    (torch_provider,) = some("lcconformer:torch")
    # plain PyTorch, which asks no backend, under another name
    claim = dataclasses.replace(torch_provider, backend="cpu", forced="cpu", build=registry.eager.build)
    said = []
    rows = suite.run_case(SMALL, [claim, registry.eager], Results(), rounds=1, say=said.append)
    assert [row.provider for row in rows] == ["eager"]
    assert said == ["skipped  lcconformer:cpu: no kernel of backend cpu ran"]


def test_a_killed_run_keeps_the_rows_of_all_providers_that_were_ready(tmp_path):
    program = f"""
import dataclasses, os, signal
from pathlib import Path
from lcconformer.bench.core.case import Case
from lcconformer.bench.core.roofline import Ceilings
from lcconformer.bench.core.rows import Results
from lcconformer.bench.providers import registry
from lcconformer.bench.runs import suite
suite.measure_ceilings = lambda case: Ceilings(0.1, 10.0)
def build(case):
    os.kill(os.getpid(), signal.SIGKILL)
deadly = dataclasses.replace(registry.eager, name="deadly", build=build)
case = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)
suite.run_case(case, [*registry.choose("eager,lcconformer:torch"), deadly], Results(Path({str(tmp_path / "out.json")!r})))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=300)
    assert done.returncode == -signal.SIGKILL
    rows = Results(tmp_path / "out.json").rows
    assert [row.provider for row in rows] == ["eager", "lcconformer"]
    assert rows[1].speedup_vs_eager == pytest.approx(rows[0].median_ms / rows[1].median_ms)


def test_results_replace_rows_of_the_same_case(tmp_path):
    path = tmp_path / "out.json"
    suite.run_case(SMALL, some("eager"), Results(path), rounds=1)
    suite.run_case(SMALL, some("eager"), Results(path), rounds=1)
    suite.run_case(SMALL.replace(frames=8), some("eager"), Results(path), rounds=1)
    assert [row.frames for row in Results(path).rows] == [9, 8]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_results_refuse_other_files(tmp_path):
    path = tmp_path / "out.json"
    path.write_text('{"something": 1}')
    with pytest.raises(ValueError, match="no result file of this suite"):
        Results(path)
    with pytest.raises(ValueError, match="missing or unknown fields: batch"):
        Row.from_json({name: None for name in FIELDS if name != "batch"})


def test_scores_that_do_not_fit_are_not_tried(monkeypatch):
    monkeypatch.setattr(suite, "free_memory", lambda device: 3 * 2 * 9 * 9 * 4.0)
    (eager, ours) = some("eager,lcconformer:torch")
    assert suite._too_large(eager, SMALL) == "its scores of attention take 0 GB, and 0 GB are free"
    assert suite._too_large(eager, SMALL.replace(frames=8)) is None
    assert suite._too_large(ours, SMALL) is None
    with pytest.raises(suite.Skip, match="its scores of attention take"):
        suite.prepare(eager, SMALL, suite.Gate(SMALL))
