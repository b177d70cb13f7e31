"""The pretrain command: progress, interruption, resuming by the checkpoint alone, and what it says to bad input."""

import argparse
import csv
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcconformer.__main__ import main
from lcconformer.cli.pretrain import add_arguments, options_of, settings_from
from lcconformer.ssl import load_checkpoint, load_model, save_checkpoint
from lcconformer.ssl.checkpoint import find_checkpoints
from lcconformer.ssl.pretraining.run import pretrain
from lcconformer.ssl.pretraining.settings import StepRecord
from lcconformer.ssl.pretraining.speech import load_speech


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def signal_at(step: int, number: signal.Signals = signal.SIGINT):
    """A callback that sends this process a signal in a step."""

    def callback(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return callback


COMMAND = (
    "pretrain --steps 400 --layers 2 --d-model 16 --heads 2 --kernel 3 --mel-bins 20 --batch-seconds 3 --device cpu"
)


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lcconformer", *COMMAND.split(), "--data", str(folder), "--out", str(out), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_rows(out: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 150
    while not ((out / "steps.csv").is_file() and (out / "steps.csv").read_text().count("\n") > count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no steps within 150 s"
        time.sleep(0.05)


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_continue(speech_folder: Path, tmp_path: Path) -> None:
    process = start(speech_folder, tmp_path)
    wait_for_rows(tmp_path, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    step = load_checkpoint(tmp_path).meta["step"]
    assert step == len(rows(tmp_path / "steps.csv"))
    assert f"checkpoint: {tmp_path}/step_{step:08d}.safetensors" in out
    assert err.rstrip().endswith(f"stopped by SIGINT; to continue: python -m lcconformer pretrain --resume {tmp_path}")
    assert "Traceback" not in err


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    speech_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(speech_folder, tmp_path, "--checkpoint-every", "2")
    wait_for_rows(tmp_path, 5, process)
    process.kill()
    process.communicate(timeout=120)
    done = load_checkpoint(tmp_path).meta["step"]
    assert done >= 4
    stop_at(monkeypatch, done + 3)
    assert main(["pretrain", "--resume", str(tmp_path)]) == 130
    assert [int(row["step"]) for row in rows(tmp_path / "steps.csv")] == list(range(1, done + 4))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The command is interrupted in this step."""
    interrupted = functools.partial(pretrain, on_step=signal_at(step), progress=False)
    monkeypatch.setattr("lcconformer.cli.pretrain.pretrain", interrupted)


SHORT = [
    *(
        "pretrain",
        "--steps",
        "6",
        "--layers",
        "2",
        "--d-model",
        "16",
        "--heads",
        "2",
        "--kernel",
        "3",
        "--mel-bins",
        "20",
    ),
    *("--batch-seconds", "3", "--subsampling", "stack:2", "--conditioning", "step,film", "--objective", "best_rq"),
    *(
        "--codebook-size",
        "16",
        "--exclude-speakers",
        "a",
        "--validation-speakers",
        "b,c",
        "--device",
        "cpu",
        "--keep",
        "9",
    ),
]


@pytest.fixture
def interrupted(speech_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run stopped after three of six steps."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        patch.chdir(speech_folder.parent)  # the place of the speech is told as seen from here
        assert main([*SHORT, "--data", speech_folder.name, "--out", str(out)]) == 130
    assert load_checkpoint(out).meta["step"] == 3
    return out


@pytest.mark.parametrize("by_out", [True, False])
def test_resuming_needs_no_other_option(by_out: bool, interrupted: Path, speech_folder: Path, tmp_path: Path) -> None:
    assert main([*SHORT, "--data", str(speech_folder), "--out", str(tmp_path / "whole")]) == 0
    assert main(["pretrain", "--resume", *(["--out"] if by_out else []), str(interrupted)]) == 0
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(interrupted)
    assert parts.meta["step"] == 6
    assert parts.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(x, parts.tensors[name]) for name, x in whole.tensors.items())
    for key in ("config", "objective", "settings", "free_settings", "speech", "data"):
        assert parts.meta[key] == whole.meta[key]
    assert rows(interrupted / "validation.csv") == rows(tmp_path / "whole" / "validation.csv")


def test_options_that_agree_or_may_change_are_taken(interrupted: Path, speech_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(speech_folder, tmp_path / "elsewhere")
    same = ["--layers", "2", "--subsampling", "stack:2", "--mask-fraction", "0.4", "--validation-speakers", "c,b"]
    free = ["--data", str(moved), "--checkpoint-every", "1", "--keep", "2", "--workers", "0"]
    assert main(["pretrain", "--resume", str(interrupted), *same, *free]) == 0
    assert [p.name[5:13] for p in find_checkpoints(interrupted)] == ["00000005", "00000006"]
    meta = load_checkpoint(interrupted).meta
    assert meta["free_settings"]["workers"] == 0
    assert meta["speech"]["data"] == [str(moved)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "3"], "--layers is 3 but was 2:"),
        (["--steps", "9", "--sharing", "none"], "--steps is 9 but was 6; --sharing is none but was all:"),
        (["--subsampling", "stack"], "--subsampling is stack:1 but was stack:2"),
        (["--conditioning", "lora"], "--conditioning is lora but was step,film"),
        (["--mask-fraction", "0.2"], "--mask-fraction is 0.2 but was 0.4"),
        (["--exclude-speakers", ""], "--exclude-speakers is empty but was a"),
        (["--validation-speakers", "d"], "--validation-speakers is d but was b,c"),
        (["--max-minutes", "1"], "--max-minutes is 1.0 but was not set"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused_by_name(
    more: list[str], message: str, interrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["pretrain", "--resume", str(interrupted), *more]) == 2
    said = capsys.readouterr().err
    assert "step_00000003.safetensors with other options: " in said
    assert message in said
    assert "leave them out, or choose another --out" in said
    assert load_checkpoint(interrupted).meta["step"] == 3


def test_other_speech_is_refused(
    interrupted: Path, speech_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(speech_folder, tmp_path / "other"))
    lines = (other / "meta.jsonl").read_text().splitlines()
    (other / "meta.jsonl").write_text("\n".join(line for line in lines if '"u03"' not in line))
    assert main(["pretrain", "--resume", str(interrupted), "--data", str(other)]) == 2
    assert "with other data: it was trained on" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_needs_the_speech(
    interrupted: Path, speech_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = load_checkpoint(interrupted)
    old = {key: value for key, value in checkpoint.meta.items() if key not in ("speech", "free_settings")}
    save_checkpoint(checkpoint.path, checkpoint.tensors, old)
    assert main(["pretrain", "--resume", str(interrupted)]) == 2
    assert "does not say which speech it was trained on: give the --data" in capsys.readouterr().err
    speech = ["--data", str(speech_folder), "--exclude-speakers", "a", "--validation-speakers", "b,c"]
    assert main(["pretrain", "--resume", str(interrupted), *speech, "--device", "cpu"]) == 0
    assert load_checkpoint(interrupted).meta["step"] == 6


def test_settings_that_no_option_gives_come_from_the_checkpoint(speech_folder: Path, tmp_path: Path) -> None:
    told = settings_from(parsed(SHORT[1:]))
    told = dataclasses.replace(told, config=told.config.replace(activation="relu"))
    train, validation = load_speech([str(speech_folder)], exclude_speakers=["a"], validation_speakers=["b", "c"])
    speech = {"data": [str(speech_folder)], "exclude_speakers": ["a"], "validation_speakers": ["b", "c"]}
    pretrain(told, train, validation, out=tmp_path, progress=False, speech=speech, on_step=signal_at(2))
    assert main(["pretrain", "--resume", str(tmp_path)]) == 0
    assert load_model(tmp_path).config.activation == "relu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resume", "gone"],
            "gone has no checkpoint to resume (files like step_00000500.safetensors); to start a run, give",
        ),
        (["--resume", "--out", "gone"], "gone has no checkpoint to resume"),
        (["--resume", "one", "--out", "two"], "--out is two but --resume is one: give one of them"),
        (["--resume"], "--out is missing"),
        (["--data", "speech"], "--out is missing: give the folder for checkpoints and logs"),
        (["--out", "run"], "--data is missing: give the speech to train on"),
    ],
)
def test_a_run_without_a_place_or_speech_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *arguments]) == 2
    assert message in capsys.readouterr().err


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_options_and_settings_say_the_same() -> None:
    """Every option but those on speech and place has its value in the settings, and back."""
    told = settings_from(parsed(SHORT[1:]))
    options = options_of(told)
    assert settings_from(argparse.Namespace(**options)) == dataclasses.replace(
        told, objective=dataclasses.replace(told.objective, mask_fraction=0.4, mask_span=40)
    )
    dests = {action.dest for action in argparse_actions()} - {"help", "data", "out", "resume"}
    assert dests - {"splits", "exclude_speakers", "validation_speakers"} == set(options)


def argparse_actions() -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser._actions


def test_help_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("(default: 12)", "(default: stack:4)", "(default: 4 x width)", "(default: 0.001)", "some with 5% of"):
        assert shown in text


def run_command(*more: str) -> int:
    return main([*COMMAND.split(), *more])


def test_the_command_runs_and_shows_its_progress(
    speech_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code = run_command(
        *("--data", str(speech_folder), "--data", str(speech_folder), "--out", str(tmp_path / "run"), "--steps", "3"),
        *("--objective", "best_rq", "--codebook-size", "16", "--subsampling", "conv:2", "--depth", "sandwich"),
    )
    out, err = capfd.readouterr()
    assert code == 0
    assert "parameters stored" in out
    assert "step_00000003.safetensors" in out
    for part in ("step 3/3", "loss ", "depth 2+1", "utterances/s", "validation loss"):
        assert part in err
    assert "\r" not in err  # into a pipe: lines, not frames of a bar
    assert load_model(tmp_path / "run").objective_settings.kind == "best_rq"


def test_a_corrupt_file_is_left_out_and_named(
    speech_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(speech_folder, tmp_path / "speech"))
    content = (folder / "u04.flac").read_bytes()
    (folder / "u04.flac").write_bytes(content[: len(content) // 2])
    (folder / "u05.flac").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped audio file \d: u0[45].flac") as caught:
        assert run_command("--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "2", "--resume") == 0
    assert sum("skipped audio file" in str(w.message) for w in caught) == 2
    assert "starting at step 1" in capsys.readouterr().out
    assert all(float(row["loss"]) > 0 for row in rows(tmp_path / "run" / "steps.csv"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "/nowhere"], "no corpus at /nowhere"),
        (["--heads", "3"], "num_heads is 3; expected a divisor of d_model"),
        (["--kernel", "4"], "conv_kernel_size is 4"),
        (["--subsampling", "stack:two"], "--subsampling is 'stack:two'; expected none, stack:FACTOR"),
        (["--subsampling", "conv:3"], "subsampling_factor is 3"),
        (["--position", "absolute"], "position is 'absolute'"),
        (["--conv-norm", "rms"], "conv_norm is 'rms'"),
        (["--sharing", "half"], "sharing is 'half'"),
        (["--conditioning", "step,magic"], "conditioning is"),
        (["--low-freq", "9000"], "need 0 <= low_freq < high_freq"),
        (["--mel-bins", "250"], "lower num_bins"),
        (["--dropout", "1"], "dropout is 1.0"),
        (["--mask-fraction", "2"], "mask_fraction is 2.0"),
        (["--exclude-speakers", "zed"], "no speaker zed"),
        (["--steps", "-5"], "steps is -5"),
        (
            ["--layers", "99999999999999999999"],
            "num_layers is 99999999999999999999; expected a positive integer, at most",
        ),
        (["--seed", str(2**64)], "seed is 18446744073709551616; expected an integer from 0"),
        (["--batch-seconds", "inf"], "batch_seconds is inf; expected a finite number"),
        (["--clip", "inf"], "clip is inf"),
        (["--max-minutes", "nan"], "max_minutes is nan"),
        (["--data", "/dev/zero"], "/dev/zero is no corpus but a device or a pipe"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_the_command_says_what_was_wrong(
    more: list[str], message: str, speech_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = [] if "--data" in more else ["--data", str(speech_folder)]
    assert run_command(*data, "--out", str(tmp_path / "run"), *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("lcconformer pretrain: ")
    assert message in said
    assert not (tmp_path / "run").exists()
