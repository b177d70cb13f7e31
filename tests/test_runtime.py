"""Atomic writes, and progress on a terminal and into a pipe."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcconformer import runtime
from lcconformer.runtime import ProgressBar, replacing, write_atomically


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Permissions of a new file under this umask."""
    old = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(old)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_and_bytes_in_a_new_folder(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "new" / "text", "grün\n").read_bytes() == "grün\n".encode()
    assert write_atomically(str(tmp_path / "new" / "bytes"), b"\0\1").read_bytes() == b"\0\1"
    assert sorted(os.listdir(tmp_path / "new")) == ["bytes", "text"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path, mode: int) -> None:
    assert permissions(write_atomically(tmp_path / "plain", "x")) == mode
    with replacing(tmp_path / "replaced") as temporary:  # as safetensors does
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert permissions(tmp_path / "replaced") == mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_atomically(tmp_path / "file", "one")

    def broken(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"lcconformer.runtime.os.{call}", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "two")
    assert target.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("lcconformer.runtime.os.fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr("lcconformer.runtime.os.replace", lambda *names: (order.append("replace"), replace(*names)))
    write_atomically(tmp_path / "file", "one")
    assert order == ["fsync", "replace", "fsync"]  # of the content, and of the folder for the name


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_bar(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    """A thousand updates in 31.25 seconds of a clock that the test moves."""
    pytest.importorskip("tqdm")
    now = [100.0]
    monkeypatch.setattr("lcconformer.runtime.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressBar("probe") as bar:
        for step in range(1, 1001):
            now[0] += 1 / 32
            bar.update(step / 1000, f"probe {step}")
            if step == 500:
                bar.say("half of it")
    return stream.getvalue()


def test_a_pipe_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_bar(monkeypatch, io.StringIO()).splitlines() == [
        " 32% 00:10<00:21 probe 320",
        "half of it",
        " 64% 00:20<00:11 probe 640",
        " 96% 00:30<00:01 probe 960",
        "100% 00:31<00:00 probe 1000",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run_bar(monkeypatch, Terminal())
    assert "half of it\n" in shown
    last = shown.rstrip("\n").rpartition("\r")[2]
    assert last.startswith("100%|")
    assert last.rstrip().endswith("probe 1000")


def test_what_was_done_before_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr", stream)
    bar = ProgressBar()
    bar.start(0.8)
    now[0] = 10.0
    bar.update(0.9)
    assert stream.getvalue() == " 90% 00:10<00:10\n"


def test_the_last_state_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressBar("probe") as bar:
        now[0] = 12.0
        bar.update(1.0)
    assert stream.getvalue() == "100% 00:12<00:00 probe\n"
