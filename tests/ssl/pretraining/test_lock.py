"""Two runs in one folder: the second one refuses and says whose the first is; a run that died is no obstacle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcconformer.ssl.pretraining.lock import lock_folder

HOLD = """
import sys, time
from pathlib import Path
from lcconformer.ssl.pretraining.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=60)


def test_the_second_run_is_refused(holder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whose = rf"another run is in {folder} \(process {holder.pid} on {socket.gethostname()}, started 20..-.*\)"
    with pytest.raises(ValueError, match=whose), lock_folder(folder):
        pass
    assert json.loads((folder / "run.json").read_text())["pid"] == holder.pid


def test_a_killed_run_is_no_obstacle(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    said = pytest.warns(UserWarning, match=f"the run of process {holder.pid} on .* ended without saying so")
    with said, lock_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "run.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("age", [10, 1000])
def test_a_run_on_another_machine(tmp_path: Path, age: float) -> None:
    """Where a file system does not lock across machines: a run that has been silent for minutes is over."""
    owner = tmp_path / "run.json"
    owner.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}))
    os.utime(owner, (time.time() - age,) * 2)
    if age < 300:
        with pytest.raises(ValueError, match="process 7 on elsewhere, started 2026-01-01"), lock_folder(tmp_path):
            pass
    else:
        with pytest.warns(UserWarning, match="the run of process 7 on elsewhere"), lock_folder(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\0"])
def test_a_damaged_note_is_a_dead_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    os.utime(tmp_path / "run.json", (time.time() - 1000,) * 2)
    with pytest.warns(UserWarning, match="ended without saying so"), lock_folder(tmp_path):
        pass


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="refused"), lock_folder(tmp_path / "a" / "run"):
        raise RuntimeError("refused")
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "kept").mkdir()
    with lock_folder(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").is_dir()
    assert not (tmp_path / "kept" / "run.json").exists()


TRY = """
import sys
from pathlib import Path
from lcconformer.ssl.pretraining.lock import lock_folder
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_folder(Path(sys.argv[1])):
        print("in", flush=True)
        sys.stdin.readline()
except ValueError:
    print("out", flush=True)
"""


def test_of_many_at_once_one_gets_in(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRY, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        found = [process.stdout.readline().strip() for process in processes]
        assert sorted(found) == ["in", "out", "out", "out"]
    finally:
        for process in processes:
            process.communicate("\n", timeout=60)
