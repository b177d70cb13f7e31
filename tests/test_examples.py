"""Every example runs as its first lines say, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# torchaudio's Conformer is plain Python, but importing the package fails where its native libraries do not fit torch;
# without those libraries it imports anywhere
WITHOUT_NATIVE_TORCHAUDIO = """
import pathlib, runpy, sys
glob = pathlib.Path.glob
pathlib.Path.glob = lambda path, *a, **k: [] if path.parts[-2:] == ("torchaudio", "lib") else glob(path, *a, **k)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name: str, *arguments: str, prelude: str = "") -> str:
    command = [sys.executable, *(["-c", prelude] if prelude else []), str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pretrain_and_probe_and_serving(tmp_path):
    pytest.importorskip("soundfile")
    out = run("pretrain_and_probe", "--out", str(tmp_path / "run"), "--steps", "3", "--probe-frames", "500")
    assert len(out.splitlines()[1].removeprefix("phone accuracy by depth:").split()) == 9
    out = run("serving_with_exit_rule", "--checkpoint", str(tmp_path / "run"))
    assert out.count("of 8 loops") == 8


def test_serving_without_a_checkpoint():
    pytest.importorskip("soundfile")
    out = run("serving_with_exit_rule", "--threshold", "10")
    assert out.count("change: ") == 4
    assert out.count("after 1 of 8 loops") == 4


def test_recognise_phones(tmp_path):
    pytest.importorskip("soundfile")
    pytest.importorskip("jiwer")
    out = run("recognise_phones", "--out", str(tmp_path / "run"), "--steps", "3")
    assert len(out.splitlines()[0].removeprefix("phone error rate by depth:").split()) == 6


def test_drop_in():
    for package in ("torchaudio", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install 'lcconformer[test]'")
    out = run("drop_in", prelude=WITHOUT_NATIVE_TORCHAUDIO)
    assert "torchaudio: 4 layers accelerated" in out
    assert "transformers: 2 layers accelerated" in out


def test_share_a_trained_encoder():
    """Fine-tuning brings the error down at every depth, and increments of low rank start and end nearer."""
    out = run("share_a_trained_encoder").splitlines()
    errors = [[float(x) for x in line.partition(":")[2].split()] for line in out if "error by depth" in line]
    assert [len(e) for e in errors] == [4] * 4
    average, fitted, low_rank, low_rank_fitted = errors
    assert all(after < 0.7 * before for after, before in zip(fitted, average))
    assert all(after < 0.7 * before for after, before in zip(low_rank_fitted, low_rank))
    assert low_rank[-1] < average[-1]
    assert low_rank_fitted[-1] < fitted[-1]


def test_every_example_is_tested():
    tested = {
        "adding_an_op",
        "drop_in",
        "pretrain_and_probe",
        "recognise_phones",
        "serving_with_exit_rule",
        "share_a_trained_encoder",
        "train_with_hf_trainer",
        "train_with_lightning",
    }
    assert {p.stem for p in EXAMPLES.glob("*.py")} == tested


def test_adding_an_op():
    out = run("adding_an_op")
    assert "auto: served by cpu, gradient [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]" in out
    assert "torch: served by torch, gradient [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]" in out
    assert "float64: served by torch" in out
    assert "compiled: equal" in out


def test_trainer_of_hugging_face(tmp_path):
    pytest.importorskip("transformers", reason="pip install 'lcconformer[test]'")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    options = ("--out", str(tmp_path), "--steps", "3")
    out = run("train_with_hf_trainer", *options, prelude=WITHOUT_NATIVE_TORCHAUDIO)
    assert "2 layers accelerated" in out
    assert "in the mean of 3 steps" in out
    assert float(out.split("logits differ by ")[1].split()[0]) < 1e-4
    assert (tmp_path / "model.safetensors").exists()


def test_lightning():
    pytest.importorskip("lightning", reason="pip install lightning")
    out = run("train_with_lightning", "--steps", "3", prelude=WITHOUT_NATIVE_TORCHAUDIO)
    assert len(out.split("error by depth: ")[1].split()) == 4
