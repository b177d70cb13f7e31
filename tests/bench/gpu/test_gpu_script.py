"""bench/gpu.sh: what it says without arguments, and a dry run through every part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.sh"


def test_gpu_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


def test_gpu_script_asks_for_a_folder():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: bash bench/gpu.sh OUT" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_gpu_script_dry_run_goes_through_every_part(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, timeout=3000)
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0
    assert "missing: a GPU that torch can use" in summary
    assert "\n!! " not in summary
    assert "\n-- " not in summary  # the sign of a part that was stopped
    parts = SCRIPT.read_text().count('\nstage "') + SCRIPT.read_text().count('\nbench "')
    assert summary.count("\nok ") == parts
    assert ", 0 parts failed; " in summary
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"summary.txt", "log.txt", "bench.json", "gpu_tests.xml", "machine.json"}
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    modes = {row["mode"] for row in rows if row["provider"] == "lcconformer" and row["backend"] == "triton"}
    assert {"inference", "training", "relpos_attention:training", "feed_forward:forward"} <= modes
    assert (tmp_path / "log.txt").stat().st_size < 1 << 20
