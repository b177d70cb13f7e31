"""bench/gpu.sh: what it says without arguments, its plan, and a dry run through every phase, in two calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lcconformer.bench.gpu.driver import plan

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.sh"
PAPER = SCRIPT.with_name("paper.sh")


def gpu_sh(*arguments: object, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_gpu_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


def test_gpu_script_asks_for_a_folder():
    for arguments in ((), ("a", "1-5", "b")):
        done = gpu_sh(*arguments)
        assert done.returncode == 2
        assert "usage: bash bench/gpu.sh OUT [PHASES]" in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("-h", "1-5"), ("out", "--plan"), ("--planned",), ("--plan", "-x")])
def test_gpu_script_refuses_unknown_options(arguments, tmp_path):
    done = gpu_sh(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    unknown = next(a for i, a in enumerate(arguments) if a.startswith("-") and not (i == 0 and a == "--plan"))
    assert done.stderr.startswith(f"unknown option {unknown}; usage: bash bench/gpu.sh OUT [PHASES]")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--help",), ("DATA", "--help"), ("DATA", "out", "-1")])
def test_paper_script_refuses_unknown_options(arguments, tmp_path):
    (tmp_path / "DATA").mkdir()
    (tmp_path / "DATA" / "ls_dev20.zip").touch()
    done = subprocess.run(
        ["bash", PAPER, *arguments], cwd=tmp_path, env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"unknown option {arguments[-1]}; usage: bash bench/paper.sh DATA OUT [SECONDS]")
    assert [p.name for p in tmp_path.iterdir()] == ["DATA"]


def test_gpu_script_prints_its_plan():
    done = gpu_sh("--plan", "6-8")
    assert done.returncode == 0
    assert done.stdout.startswith("phase ")
    assert "\n6  encoders" in done.stdout
    assert "\n5  " not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_gpu_script_dry_run_goes_through_every_phase(tmp_path):
    first = gpu_sh(tmp_path, timeout=1800)
    assert first.returncode == 0
    text = (tmp_path / "summary.txt").read_text()
    assert "missing: a GPU that torch can use" in text
    assert {p.name for p in tmp_path.iterdir()} == {
        "summary.txt", "log.txt", "state.json", "machine.json", "bench.json", "kernels.json", "profiles.json", "gpu_tests.xml",
    }  # fmt: skip

    second = gpu_sh(tmp_path, "6-8", timeout=1800)
    assert second.returncode == 0
    text = (tmp_path / "summary.txt").read_text()
    assert "\n!! " not in text
    assert "\n-- " not in text  # the sign of a job that was stopped
    for phase in plan(tmp_path, tmp_path, tmp_path, gpu=False):
        assert f"\n== {phase.number}  {phase.name}" in text
    jobs = sum(len(stage) for phase in plan(tmp_path, tmp_path, tmp_path, gpu=False) for stage in phase.stages)
    assert text.count("\nok ") == jobs + 1  # the second call looks for the extension too
    assert text.count(", 0 failures; 8 files in ") == 2

    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    found = {(row["mode"], row["backend"]) for row in rows if row["provider"] == "lcconformer"}
    assert {("inference", "triton"), ("training", "triton"), ("training", "triton+loop")} <= found
    state = json.loads((tmp_path / "state.json").read_text())
    assert sorted(state) == ["phase 2", "phase 3", "phase 4", "phase 6", "phase 7", "phase 8"]
    assert {entry["status"] for phase in state.values() for entry in phase.values()} == {"done"}
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert any(name.startswith("relpos_attention backward, ") for name in kernels)
    assert any(name.startswith("variants of glu_depthwise_conv forward, ") for name in kernels)
    assert (tmp_path / "log.txt").stat().st_size < 1 << 20

    # a third call finds all done
    bench = (tmp_path / "bench.json").read_text()
    assert gpu_sh(tmp_path, "4", timeout=1800).returncode == 0
    assert (tmp_path / "bench.json").read_text() == bench
