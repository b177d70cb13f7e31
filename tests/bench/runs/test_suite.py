"""From case to rows: who is skipped, who is refused, what an interruption keeps."""

import dataclasses
import json

import pytest
import torch
from lcconformer.bench.core.case import Case, parse_shapes
from lcconformer.bench.core.rows import Results, Row
from lcconformer.bench.core.timing import Timing, peak_memory_mb, time_interleaved
from lcconformer.bench.providers import registry
from lcconformer.bench.runs import suite

from lcconformer import loop
from lcconformer.ops._backend import forced_backend

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)
FIELDS = [
    *("provider", "backend", "mode", "batch", "frames", "d_model", "layers", "depth", "dtype", "device", "device_name"),
    *("versions", "commit", "median_ms", "p20_ms", "p80_ms", "tokens_per_s", "rtf", "peak_memory_mb", "tflops"),
    *("gb_per_s", "percent_of_roofline", "speedup_vs_eager"),
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


def test_interleaving_turns_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_interleaved(calls, "cpu", seconds=0.0, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert set(found) == set("abc")


def test_rounds_follow_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lcconformer.bench.core.timing.time.perf_counter", lambda: now[0])

    def call():
        now[0] += 0.125
        count[0] += 1

    for seconds, expected in ((0.0, 5), (1.25, 10), (100.0, 100)):
        count = [0]
        assert time_interleaved({"a": call}, "cpu", seconds)["a"].median == 125.0
        assert count[0] == expected


def test_timing_quantiles():
    assert Timing.of([float(x) for x in range(11)]) == Timing(5.0, 2.0, 8.0)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(250_000)  # 1 MB

    def call():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert peak_memory_mb(call, "cpu") == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "nonsense"}, "mode is 'nonsense'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"depth": 3}, "depth is 3; expected 1 to the number of layers, 2"),
        ({"d_model": 100}, "d_model is 100; expected a multiple of 64"),
        ({"batch": 0}, "expected positive sizes"),
    ],
)
def test_bad_cases(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


def test_shapes():
    assert parse_shapes("1x400,8X100") == [(1, 400), (8, 100)]
    with pytest.raises(ValueError, match=r"shapes are '8-100'; expected BATCHxFRAMES"):
        parse_shapes("8-100")


def test_unknown_provider():
    with pytest.raises(ValueError, match="no provider 'nemo'; use some of eager:torch"):
        some("nemo")


def test_each_engine_has_a_row_of_its_own():
    chosen = {str(p): p for p in registry.choose("lcconformer")}
    assert chosen["lcconformer:cpu"].engine == "modules"
    assert chosen["lcconformer:cpu+loop"].engine == "loop"
    with chosen["lcconformer:cpu+loop"].scope():
        assert (loop.forced_engine(), forced_backend()) == ("loop", "cpu")
    assert chosen["lcconformer:cpu+loop"].missing(SMALL.replace(mode="feed_forward:forward")) == "has no such op"
