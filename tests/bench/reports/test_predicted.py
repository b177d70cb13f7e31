"""Predicted encoders: what is recorded, gaps, goals and what forbids them; the cost model's grids are the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lcconformer.bench.core import gpu_model
from lcconformer.bench.core.recording import Aten, Triton
from lcconformer.bench.reports import predicted as module
from lcconformer.bench.reports.predicted import Group, Result, inference, markdown, predicted, training
from lcconformer.kernels import report
from lcconformer.kernels.common import AotConfig
from lcconformer.kernels.cost_shapes import Shape, work

FILED = Path(__file__).parents[3] / "bench" / "results" / "predicted.json"


def result(**changes: object) -> Result:
    groups = (Group("launch gaps", 22, 40.0), Group("attention", 1, 10.0))
    given = {
        "mode": "inference", "batch": 1, "frames": 100, "d_model": 256, "ours": 0.6, "eager": 3.0, "compiled": 1.8,
        "kernels": 22.0, "groups": groups, "names": groups,
    }  # fmt: skip
    return Result(**(given | changes))


def test_goals_of_a_case_and_what_forbids_them():
    eager, compiled = result().goals()
    assert (eager[0].against, eager[0].factor, eager[1]) == ("eager", 8.5, pytest.approx(5.0))
    assert (compiled[0].against, compiled[0].factor, compiled[1]) == ("compile", 2.6, pytest.approx(3.0))
    # 3000 us / 8.5 are allowed, 600 us are taken, by 12 layers
    assert result().forbids(eager[0]) == "21 us a layer too many: launch gaps 40"
    # what a term takes at the least is none of what could be saved
    groups = (Group("attention", 1, 500.0), Group("launch gaps", 22, 2.0))
    long = result(batch=32, frames=1500, ours=20.0, eager=20.0, compiled=20.0, groups=groups)
    assert long.forbids(long.goals()[0][0]) == (
        "1374 us a layer too many: attention 500 (least 403), launch gaps 2; that is not enough"
    )
    text = markdown([result()])
    assert "never results" in text
    lines = [line for line in text.splitlines() if line.startswith("inference (1,100) d=256")]
    assert "launch gaps 40" in lines[0]
    assert "launch gaps" not in lines[1]
    assert "# Before the review of the compiled code, and now" in text


@pytest.mark.parametrize("frames", [100, 400])
def test_a_call_of_inference(monkeypatch, frames):
    """Every kernel has its time, and a gap in front of it; few rows are the chain's, many those of the modules."""
    batch = 1 if frames == 100 else 32
    monkeypatch.setattr(module._Model, "__call__", lambda *_: ("GEMM", 1e-6))
    events = inference(batch, frames, 256)
    found = predicted("inference", batch, frames, 256)
    assert found.kernels == len(events) / 12
    gaps = sum(
        gpu_model.gap_seconds(dependent=isinstance(e, Triton) and e.launch.pdl, filled=isinstance(e, Triton))
        for e in events
    )
    assert {g.name: (g.kernels, g.microseconds) for g in found.groups} == {
        "launch gaps": (len(events) / 12, pytest.approx(gaps * 1e6 / 12)),
        "matrix products": (len(events) / 12, pytest.approx(len(events) / 12)),
    }
    assert found.ours * 1e3 == pytest.approx(gaps * 1e6 + len(events))
    products = Counter(e.product for e in events if isinstance(e, Aten) and e.product)
    if batch == 1:
        assert len(events) / 12 <= 11
        assert products == {(1, 255, 256, 256): 1}  # positions, of T rounded up to 128
    else:
        # both feed-forwards, queries keys and values; T is rounded up to 448; positions once
        assert products[(1, 32 * 448, 1024, 256)] == 24
        assert products[(1, 32 * 448, 256, 1024)] == 24
        assert products[(1, 32 * 448, 768, 256)] == 12
        assert products[(1, 895, 256, 256)] == 1


def own_config(event: Triton) -> AotConfig:
    """The shipped configuration that agrees with the launch in most constants, with the tiles of the launch."""
    import dataclasses

    shipped = [c for m in report.kernel_modules() for c in report.configs(m, 90) if c.kernel is event.kernel]
    best = max(shipped, key=lambda c: sum(event.arguments.get(n) == v for n, v in c.constexprs.items()))
    return dataclasses.replace(best, launch=event.launch)


@pytest.mark.parametrize(("record", "frames"), [(inference, 448), (training, 400)])
def test_grids_are_those_of_the_launches(record, frames):
    """What cost_shapes states for the report is what the host code launches."""
    events = [e for e in record(32, 400, 256) if isinstance(e, Triton)]
    shape = Shape(32, frames, 256)
    names = set()
    for event in events:
        config = own_config(event)
        if config.name.startswith("partials"):
            continue  # of any size
        stated = work(config, shape)
        blocks = 1
        for size in event.grid:
            blocks *= size
        assert stated is not None
        assert stated.grid == blocks, config.name
        names.add(config.name.split()[0])
    assert len(names) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_report(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lcconformer.bench.reports.predicted", "--mode", "inference", "--d-model", "256"]
    done = subprocess.run([*command, "--out", str(tmp_path / "p")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "p.json").read_text())
    assert [(c["batch"], c["frames"]) for c in written["cases"]] == [(1, 100), (32, 400), (32, 1500)]
    assert all(0 < c["ours_ms"] < 100 for c in written["cases"])
    assert (tmp_path / "p.md").read_text() == done.stdout[:-1]


def test_it_needs_kernels_that_can_be_compiled(capsys):
    if not report.INTERPRETED:
        pytest.skip("a GPU is here: kernels are compiled")
    assert module.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_the_filed_predictions_say_that_they_are_none_of_results():
    filed = json.loads(FILED.read_text())
    assert "never results" in filed["note"]
    assert "never results" in FILED.with_suffix(".md").read_text()
    assert len(filed["cases"]) == len(module.CASES)
