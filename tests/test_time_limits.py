"""No step of ``.ci/run`` and no test can run for ever."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# `timeout` that notes its limit for the command, and shortens it to one second for the command named SHORT
TIMEOUT = """#!/bin/sh
export LIMIT="$3"
case "$4" in "$SHORT") shift 3; exec {timeout} -k 1 1 "$@" ;; esac
shift 3
exec "$@"
"""
TOOL = """#!/bin/sh
echo "${LIMIT:-none} ${0##*/} $*" >> "$LOG"
case "${0##*/}" in "$SHORT") sleep 60 ;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> dict[str, str]:
    """An environment to run a copy of ``.ci/run`` in, whose tools only note the limit they run under."""
    timeout = shutil.which("timeout")
    assert timeout is not None
    tools = tmp_path / "tools"
    for folder in (tools, tmp_path / ".ci"):
        folder.mkdir()
    (tools / "timeout").write_text(TIMEOUT.format(timeout=timeout))
    for name in ("pip", "pytest", "python", "python3", "ruff", "mypy"):
        (tools / name).write_text(TOOL)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "format.sh").write_text(TOOL)
    for path in tools.iterdir():
        path.chmod(0o755)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    command = "mkdir -p .venv/bin && touch .venv/bin/activate && pip install . && pytest quick"
    (tmp_path / "README.md").write_text(f"<!-- test command -->\n```bash\n{command}\n```\n")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "LOG": str(tmp_path / "log"), "SHORT": "none"}


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    root = Path(environment["LOG"]).parent
    return subprocess.run(["bash", root / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=240)


def test_every_step_runs_under_a_limit(checkout: dict[str, str]) -> None:
    done = run(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ran = [line.split(" ", 1) for line in Path(checkout["LOG"]).read_text().splitlines()]
    assert len(ran) == 12
    tools = {what.split(" ")[0] for _, what in ran}
    assert tools == {"pip", "pytest", "python", "python3", "ruff", "mypy", "format.sh"}
    for limit, what in ran:
        assert limit.isdecimal(), f"no limit: {what}"
        assert 60 <= int(limit) <= 3600, what


def test_a_step_that_runs_out_of_time_is_named(checkout: dict[str, str]) -> None:
    # the step's own limit is in seconds of the script: make both one second
    script = Path(checkout["LOG"]).parent / ".ci" / "run"
    script.write_text(script.read_text().replace('step 300 "lint"', 'step 1 "lint"'))
    done = run({**checkout, "SHORT": "ruff"})
    assert done.returncode == 124
    assert ".ci/run: ran out of time after 1 s: lint" in done.stderr
    assert "=== kernels" not in done.stdout


def test_a_step_that_fails_is_not_said_to_be_late(checkout: dict[str, str]) -> None:
    (Path(checkout["LOG"]).parent / "tools" / "ruff").write_text("#!/bin/sh\nexit 7\n")
    done = run(checkout)
    assert done.returncode == 7
    assert "ran out of time" not in done.stderr


@pytest.mark.parametrize("tool", ["mypy", "python"])
def test_steps_that_run_side_by_side_both_count(checkout: dict[str, str], tool: str) -> None:
    (Path(checkout["LOG"]).parent / "tools" / tool).write_text("#!/bin/sh\nexit 7\n")
    done = run(checkout)
    assert done.returncode == 123  # of xargs
    assert "=== Triton" not in done.stdout


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.hasplugin("timeout"), "pip install 'lcconformer[test]'"
    assert pytestconfig.getini("timeout") == "300"
    assert pytestconfig.getini("timeout_method") == "thread"
    assert 0 < float(pytestconfig.getini("faulthandler_timeout")) < float(pytestconfig.getini("timeout"))


def test_a_test_that_no_signal_reaches_ends(tmp_path: Path) -> None:
    """Compiled code that never returns: no handler of Python's runs."""
    (tmp_path / "test_hang.py").write_text(
        "import signal, time\n"
        "def test_hangs():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "    time.sleep(200)\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "timeout=1"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", tmp_path / "test_hang.py"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert "test_hangs" in done.stdout + done.stderr
    assert "Timeout" in done.stdout + done.stderr


def test_a_hang_under_xdist_is_shown_and_the_rest_runs(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_some(number):\n"
        "    time.sleep(200 * (number == 4))\n"
    )
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    command = re.search(r"pytest (-n auto \S+ \S+)", (ROOT / "README.md").read_text())
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, *command[1].split(),
         "-o", "timeout=4", "-o", "faulthandler_timeout=2", "-p", "no:cacheprovider", tmp_path],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 failed, 6 passed" in done.stdout
    assert "test_some[4]" in done.stdout
    assert 'test_hang.py", line 4 in test_some' in done.stderr


def test_the_report_says_how_a_worker_died(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_death.py").write_text(
        "import faulthandler, os, time\n"
        "def test_a():\n    faulthandler._sigsegv()\n"
        "def test_b():\n    os._exit(3)\n"
        "def test_c():\n    pass\n"
        "def test_d():\n    time.sleep(200)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-n", "1",
         "-o", "timeout=6", "-o", "faulthandler_timeout=3", "-p", "no:cacheprovider", tmp_path],
        capture_output=True, text=True, timeout=240, env={**os.environ, "TMPDIR": str(tmp_path), "CI": "1"},
    )  # fmt: skip
    assert "3 failed, 1 passed" in done.stdout
    # in the last lines of the output, which are the ones that are kept where much is cut
    end = done.stdout[done.stdout.index("short test summary") :]
    a, b, d = sorted(end.split("FAILED ")[1:])
    assert f"ended with signal {signal.SIGSEGV.value}" in a
    assert 'test_death.py", line 3 in test_a' in a
    assert "ended with code 3" in b
    assert "ended with code 1" in d
    assert 'test_death.py", line 9 in test_d' in d
    assert not list(tmp_path.glob("lcconformer-tests-*"))
