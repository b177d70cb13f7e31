"""The entry: help, version, errors in one line, interruption, a closed pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lcconformer
from lcconformer import __main__ as command_line


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, (_, summary) in command_line.COMMANDS.items():
        assert name in text
        assert summary.split()[0] in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--version"])
    assert capsys.readouterr().out.strip() == f"lcconformer {lcconformer.__version__}"


def test_without_arguments_prints_the_help(capsys):
    """On the standard error and with exit status 2, as uv does: nothing was done, and a script should notice."""
    assert command_line.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(name in captured.err for name in command_line.COMMANDS)


@pytest.mark.parametrize("argv", [["no-such-command"], ["info", "--no-such-option"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("depth is 0"), 2, "lcconformer info: depth is 0"),
        (FileNotFoundError("no file x"), 2, "lcconformer info: no file x"),
        (NotImplementedError("cannot"), 2, "lcconformer info: cannot"),
        (ImportError("install lcconformer[demo]"), 2, "lcconformer info: install lcconformer[demo]"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_without_traceback(monkeypatch, capsys, error, code, said):
    def fail(_args):
        raise error

    command = SimpleNamespace(add_arguments=lambda parser: None, run=fail)
    monkeypatch.setitem(sys.modules, "lcconformer.failing", command)
    monkeypatch.setitem(command_line.COMMANDS, "info", ("lcconformer.failing", "fails"))
    assert command_line.main(["info"]) == code
    assert capsys.readouterr().err.strip() == said


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(_args):
        raise KeyError("a bug")

    monkeypatch.setitem(sys.modules, "lcconformer.failing", SimpleNamespace(add_arguments=lambda p: None, run=fail))
    monkeypatch.setitem(command_line.COMMANDS, "info", ("lcconformer.failing", "fails"))
    with pytest.raises(KeyError, match="a bug"):
        command_line.main(["info"])


def test_import_is_light():
    """Importing touches no device, compiles nothing, and needs no optional package."""
    heavy = ["triton", "lhotse", "soundfile", "matplotlib", "tensorboard", "transformers", "torchaudio"]
    code = f"""
import sys
import torch
torch.cuda.init = torch._C._cuda_init = lambda *a: sys.exit("CUDA was initialised")
before = set(sys.modules)
import lcconformer, lcconformer.__main__
loaded = [name for name in {heavy} if name in set(sys.modules) - before]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lcconformer", "info", "--help"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_console_script():
    script = Path(sys.executable).with_name("lcconformer")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"lcconformer {lcconformer.__version__}\n"


def test_a_closed_pipe_ends_quietly():
    """The reader has left before the first line, the hardest case of ``lcconformer info | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lcconformer", "info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141  # 128 + SIGPIPE, as a shell reports a process that the signal ended
