"""gpu.sh, the constants of the machine, and the comparison of commits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.gpu import constants
from lcconformer.bench.runs import compare

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.sh"


def test_gpu_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


def test_gpu_script_asks_for_a_folder():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: bash bench/gpu.sh OUT" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_gpu_script_dry_run_goes_through_every_part(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, timeout=3000)
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0
    assert "missing: a GPU that torch can use" in summary
    assert "!!" not in summary
    assert "-- " not in summary
    parts = SCRIPT.read_text().count('\nstage "') + SCRIPT.read_text().count('\nbench "')
    assert summary.count("\nok ") == parts
    assert ", 0 parts failed; " in summary
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"summary.txt", "log.txt", "bench.json", "gpu_tests.xml", "machine.json"}
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    modes = {row["mode"] for row in rows if row["provider"] == "lcconformer" and row["backend"] == "triton"}
    assert {"inference", "training", "relpos_attention:training", "feed_forward:forward"} <= modes
    assert (tmp_path / "log.txt").stat().st_size < 1 << 20


def test_constants_without_a_gpu_say_what_is_missing(tmp_path):
    path = tmp_path / "machine.json"
    found = constants.measure(path, "cpu", small=True)
    assert json.loads(path.read_text()) == found
    assert found["missing"] == {"launch_and_chip": "needs a CUDA device"}
    assert len(found["matrix_products_tflops"]) == 5
    assert all(
        rate > 0 for rate in (*found["matrix_products_tflops"].values(), *found["torch_depthwise_gb_per_s"].values())
    )


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


def test_both_commits_are_timed_in_turn():
    order = []
    calls = {name: lambda name=name: (order.append(name), 1.0)[1] for name in ("new", "old")}
    found = compare._interleave(calls, seconds=0.0, rounds=3)
    assert order == ["new", "old", "old", "new", "new", "old"]
    assert found["new"].median == 1.0
