"""The command from start to end on a small scale: killed, stopped, run again, changed, told nonsense."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lcconformer.__main__ import main
from lcconformer.ssl.evaluation.probes import ProbeSettings
from lcconformer.ssl.finetuning.learner import Learner
from lcconformer.ssl.model import FeatureSettings
from lcconformer.ssl.reproduction import PRESETS
from lcconformer.ssl.reproduction import run as run_module

pytest.importorskip("jiwer", reason="pip install 'lcconformer[speech]'")
pytest.importorskip("matplotlib", reason="pip install 'lcconformer[demo]'")

pytestmark = pytest.mark.timeout(900)  # a dozen trainings of a second, on busy machines too
KINDS = ("scratch-A", "scratch-C", "random-C", "pretrain-A", "pretrained-A", "frozen-A", "probe-A",
         "pretrain-C", "pretrained-C", "frozen-C", "probe-C")  # fmt: skip


def miniature(preset):
    """The preset with an encoder and trainings of a second."""
    config = preset.finetune.config.replace(
        d_model=16, num_heads=2, ffn_dim=32, num_layers=3, conv_kernel_size=7, input_dim=24
    )
    small = {"config": config, "features": FeatureSettings(24), "batch_seconds": 4.0, "checkpoint_every": 2}
    return dataclasses.replace(
        preset,
        finetune=dataclasses.replace(preset.finetune, **small, steps=6, precision="float32"),
        pretrain=dataclasses.replace(preset.pretrain, **small, steps=4, precision="float32"),
        probe=ProbeSettings(max_frames=1500, hidden=8, epochs=1),
        models=("A", "C"),
        seeds=1,
        timing_rounds=1,
        consistency_frames=300,
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, preset in list(PRESETS.items()):
        monkeypatch.setitem(PRESETS, name, miniature(preset))


@pytest.fixture(scope="module")
def spoken(make_speech) -> Path:
    return make_speech("told", 12)


def command(spoken: Path, out: Path, *more: str) -> list[str]:
    speakers = ["--test-speakers", "s2", "--validation-speakers", "s1"]
    return [
        "reproduce",
        "--preset",
        "tiny",
        "--data",
        str(spoken),
        *speakers,
        "--out",
        str(out),
        "--device",
        "cpu",
        *more,
    ]


def results(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("runs/*/result.json")}


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv.pop(1).split(os.pathsep)
import test_reproduce
import torch
torch.set_num_threads(1)
from lcconformer.__main__ import main
from lcconformer.ssl.finetuning.learner import Learner
from lcconformer.ssl.reproduction import PRESETS
PRESETS["tiny"] = test_reproduce.miniature(PRESETS["tiny"])
step = Learner.step
def fatal(self, number, *rest):
    if number == 4 and self._settings.depth == "uniform":  # C
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *rest)
Learner.step = fatal
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(spoken, tmp_path_factory) -> Path:
    """The folder of all parts with one seed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", miniature(PRESETS["tiny"]))
        assert main(command(spoken, out)) == 0
    return out


def test_every_run_has_a_folder_and_a_place_in_the_report(whole) -> None:
    assert sorted(results(whole)) == sorted(path.name for path in (whole / "runs").iterdir())
    assert sorted(name.partition("-seed0")[0] for name in results(whole) if "timing" not in name) == sorted(KINDS)
    page = (whole / "report.md").read_text()
    assert "Not complete" not in page
    for text in ("Gate of pretraining", "C, random weights: linear probe", "log-mel, 11 frames", "frozen, heads alone"):
        assert text in page


def test_a_killed_command_goes_on_and_ends_with_equal_files(whole, spoken, tmp_path, capsys, monkeypatch) -> None:
    out, here = tmp_path / "parts", str(Path(__file__).parent)
    supervised = command(spoken, out, "--parts", "supervised")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, here, *supervised], capture_output=True, text=True, timeout=400
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [name.partition("-seed")[0] for name in results(out)] == ["scratch-A"]
    (half,) = out.glob("runs/scratch-C*/training")
    assert [path.name for path in half.glob("step_*")] == ["step_00000004.safetensors"]
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/times.json")}
    monkeypatch.setattr(run_module, "write_report", lambda out: out)  # it takes seconds
    steps = []
    step = Learner.step
    monkeypatch.setattr(
        Learner, "step", lambda self, number, *rest: (steps.append(number), step(self, number, *rest))[1]
    )
    with pytest.warns(UserWarning, match="ended without saying so"):
        assert main(supervised) == 0
    assert steps[:2] == [4, 5]  # the rest of C; A is not trained again
    assert results(out).items() <= results(whole).items()
    assert len(results(out)) == 3
    assert {path: path.stat().st_mtime_ns for path in done} == done

    # a third time there is nothing left to do; another model is added to what is there
    monkeypatch.setattr(run_module, "execute", lambda run, *rest: pytest.fail(f"{run.name} is repeated"))
    assert main(supervised) == 0
    with pytest.raises(pytest.fail.Exception, match="scratch-B-seed0 is repeated"):
        main([*supervised, "--models", "A,B,C"])
    # but not by another commit, unless that is wanted
    monkeypatch.setattr(run_module, "commit", lambda: "another")
    assert main(supervised) == 0  # nothing is added
    capsys.readouterr()
    assert main([*supervised, "--models", "A,B,C"]) == 2
    assert "--mix-commits, and the report will say so" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception):
        main([*supervised, "--models", "A,B,C", "--mix-commits"])


def test_a_signal_ends_the_step_and_says_how_to_go_on(spoken, tmp_path, capsys, monkeypatch) -> None:
    step = Learner.step

    def stop(self, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *rest)

    monkeypatch.setattr(Learner, "step", stop)
    assert main(command(spoken, tmp_path / "out", "--parts", "supervised")) == 143
    assert "stopped by SIGTERM; to continue: lcconformer" in capsys.readouterr().err
    (kept,) = tmp_path.glob("out/runs/scratch-A*/training/step_*")
    assert kept.name == "step_00000003.safetensors"


def test_the_report_holds_what_was_measured(whole, spoken) -> None:
    out = whole
    assert main(command(spoken, out, "--parts", "supervised", "--seeds", "2")) == 0
    page, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    found = {}
    for model in "AC":
        runs = [json.loads(path.read_text()) for path in out.glob(f"runs/scratch-{model}-*/result.json")]
        found[model] = np.array([[100 * row["per"] for row in run["rows"]["test"]] for run in runs])  # [seeds, depths]
    for model, per in found.items():
        error = per.std(0, ddof=1) / np.sqrt(2)
        cells = " | ".join(f"{m:.1f} ± {e:.1f}" for m, e in zip(per.mean(0), error))
        assert f"| {model} | {cells} |" in page
    # (N P + O) / (P + O), by counting
    encoders = {m: json.loads(next(out.glob(f"runs/scratch-{m}-*/result.json")).read_text())["encoder"] for m in "AC"}
    assert f"{encoders['A']['unique'] / encoders['C']['unique']:.2f}x | 7.8x" in page
    assert encoders["A"]["unique"] == encoders["C"]["effective"]
    assert "Gate of the task" in page
    assert "failed, insensitive" in page  # six steps are no training
    assert "commit" in page
    assert str(spoken.parent) not in page + html
    plots = re.findall(r"\]\((\w+\.png)\)", page)
    assert {"errors.png", "inference.png", "consistency.png"} <= {*plots}
    assert all((out / name).is_file() for name in plots)
    assert html.count("data:image/png;base64,") == len(plots)
    assert 'src="http' not in html


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "A,Z"], "there is no model Z"),
        (["--models", "C"], "A and C must be among them"),
        (["--parts", "all"], "there is no part all"),
        (["--seeds", "0"], "number of seeds is 0"),
        (["--pretrain-data", "missing"], "no corpus at missing"),
    ],
)
def test_command_says_what_is_wrong(spoken, tmp_path, capsys, more, message) -> None:
    assert main(command(spoken, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def librispeech(folder: Path) -> Path:
    """A tree of two subsets to train on, one to validate and two to test, two speakers each, made of noise."""
    soundfile = pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    subsets = ("train-clean-100", "train-other-500", "dev-clean", "test-clean", "test-other")
    for place, subset in enumerate(subsets):
        for speaker in (10 * place + 1, 10 * place + 2):
            chapter = folder / subset / str(speaker) / "7"
            chapter.mkdir(parents=True)
            lines = []
            for number in range(3):
                name = f"{speaker}-7-{number:04}"
                sound = 0.1 * rng.standard_normal(int(16_000 * rng.uniform(1.0, 1.5)))
                soundfile.write(chapter / f"{name}.flac", sound.astype(np.float32), 16_000)
                lines.append(f"{name} SOME WORDS\n")
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    return folder


SEVERAL = """
import os, sys
sys.path[:0] = sys.argv.pop(1).split(os.pathsep)
import test_reproduce
import torch
torch.set_num_threads(1)
from lcconformer.__main__ import main
from lcconformer.ssl.reproduction import PRESETS
PRESETS["paper"] = test_reproduce.miniature(PRESETS["paper"])
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_pretrain_on_librispeech_and_one_does_the_rest(tmp_path) -> None:
    tree, out, worker = librispeech(tmp_path / "LibriSpeech"), tmp_path / "out", tmp_path / "worker.py"
    worker.write_text(SEVERAL)
    arguments = [str(worker), str(Path(__file__).parent), "reproduce", "--preset", "paper", "--data", str(tree)]
    arguments += ["--out", str(out), "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def call(*launcher: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, *arguments], capture_output=True, text=True, timeout=280, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "the rest needs one process" in call(*torchrun)
    assert [name.partition("-seed")[0] for name in sorted(results(out))] == ["pretrain-A", "pretrain-C"]
    pretrained = results(out)
    assert all(json.loads(path.read_text())["processes"] == 2 for path in out.glob("runs/*/times.json"))
    assert "report:" in call(sys.executable)
    rest = results(out)
    assert pretrained.items() <= rest.items()
    kinds = {name.partition("-seed")[0].partition("-A")[0] for name in rest}
    assert {"pretrained", "frozen"} <= kinds
    assert not {"probe", "random"} & {name.partition("-")[0] for name in rest}  # no alignments
    speech = json.loads((out / "reproduction.json").read_text())["speech"]
    assert {role: part["named"] for role, part in speech.items()} == {
        "train": ["1", "11", "12", "2"],
        "validation": ["21", "22"],
        "test": ["31", "32"],  # of test-clean
        "pretraining": ["1", "11", "12", "2"],
    }
    page = (out / "report.md").read_text()
    assert "CER (%), depth" in page
    assert "Gate" not in page  # of phones
