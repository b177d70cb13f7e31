"""The demo command from start to end, interrupted, and told nonsense."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lcconformer.__main__ import main
from lcconformer.ssl.demo.training import FIXED, SAMPLED
from lcconformer.ssl.evaluation.probes import accuracies

FIGURES = ("training_loss", "held_out_loss", "consistency", "inference_time", "probe_accuracy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0; expected 0.5 to 600"),
        (["--data", "missing"], "no corpus at missing"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, False])
def test_threads_of_the_environment(told, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not told:
        monkeypatch.delenv("OMP_NUM_THREADS")
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert main(["demo", "--data", "missing"]) == 2
    assert asked == ([] if told else [2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_from_start_to_end(tmp_path):
    out = tmp_path / "out"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lcconformer", "demo", "--out", str(out), "--minutes", "1"],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["setup"]["wall_seconds"] < time.perf_counter() - began
    saving = results["saving"]
    assert saving["time_saved"] == pytest.approx(
        1 - results["training"][SAMPLED]["seconds"] / results["training"][FIXED]["seconds"]
    )
    # time measures the machine's load too; loops do not
    assert 0.2 < saving["loops_saved"] < 0.7
    assert 7.0 < results["parameters"]["ratio"] < 8.0
    for figure in FIGURES:
        assert (out / f"{figure}.png").stat().st_size > 10_000
    assert f"{100 * saving['time_saved']:.1f}%" in done.stdout
    assert str(out / "report.html") in done.stdout
    for probe in ("linear", "hidden"):
        # the majority class is 8%
        assert min(accuracies(results["probe"]["rows"], SAMPLED, probe).values()) > 0.15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupt_says_what_is_lost(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lcconformer", "demo", "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (out.is_dir() and list(out.glob(".running-*/*/steps.csv"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "nothing was written to" in errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []
