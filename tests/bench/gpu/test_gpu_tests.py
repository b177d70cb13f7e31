"""The tests of a GPU in several processes: every test in one share, one report, and what an interrupted run leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from lcconformer.bench.gpu import gpu_tests

ROOT = Path(__file__).parents[3]


def collected(shard: str | None) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "LCCONFORMER_TEST_SHARD"}
    if shard is not None:
        env["LCCONFORMER_TEST_SHARD"] = shard
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    paths = ["tests/kernels/test_relpos_attention.py", "tests/ops/test_feed_forward.py"]
    done = subprocess.run([*command, *paths], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_test_is_in_one_share_and_those_of_the_same_kernels_in_the_same():
    whole, shares = collected(None), [collected(f"{i}/3") for i in range(3)]
    assert sorted(test for share in shares for test in share) == sorted(whole)
    assert all(len(share) > len(whole) // 6 for share in shares)
    groups = [{t.rpartition("[")[2].split("-", 1)[1] for t in share if "equals_the_oracle" in t} for share in shares]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 15  # head widths and dtypes, all their lengths together


@pytest.fixture
def repository(tmp_path):
    """Tests like ours: two that pass, one that fails, one that is not for a GPU."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu", "slow"]\n')
    for folder in gpu_tests.FOLDERS:
        (tmp_path / "tests" / folder).mkdir(parents=True)
    # a GPU is missing here: the marker alone must not skip
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    start = conftest.index("    if torch.cuda.is_available():\n        return\n")
    end = conftest.index("@pytest.fixture(autouse=True)")
    (tmp_path / "tests" / "conftest.py").write_text(conftest[:start] + "\n\n" + conftest[end:])
    (tmp_path / "tests" / "ops" / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('t', [1, 2])\ndef test_passes(t): pass\n"
        "@pytest.mark.gpu\ndef test_fails(): assert False\n"
        "def test_elsewhere(): assert False\n"
    )
    return tmp_path


def outcomes(report: Path) -> dict[str, str]:
    return {
        case.get("name", ""): next((child.tag for child in case), "passed")
        for case in ElementTree.parse(report).iter("testcase")
    }


def test_the_reports_become_one(repository, capfd):
    assert gpu_tests.run(repository / "out.xml", repository, 2, 120) == 1
    assert outcomes(repository / "out.xml") == {
        "test_passes[1]": "passed",
        "test_passes[2]": "passed",
        "test_fails": "failure",
    }
    assert "exit codes 0, 1" in capfd.readouterr().out
    (repository / "tests" / "ops" / "test_a.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_passes(): pass\n"
    )
    # a share without tests is no failure
    assert gpu_tests.run(repository / "out.xml", repository, 2, 120) == 0
    assert outcomes(repository / "out.xml") == {"test_passes": "passed"}


@contextlib.contextmanager
def started(repository: Path, hangs: str) -> Iterator[subprocess.Popen[str]]:
    """The command, once ``test_hangs``, whose code this is, runs."""
    at_work = repository / "at_work"
    (repository / "tests" / "ops" / "test_b.py").write_text(
        f"import pytest, signal, time\nfrom pathlib import Path\n@pytest.mark.gpu\ndef test_hangs():\n{hangs}"
    )
    command = [sys.executable, "-m", "lcconformer.bench.gpu.gpu_tests", repository / "out.xml", repository]
    process = subprocess.Popen([*command, "--processes", "1", "--seconds", "240"], stdout=subprocess.PIPE, text=True)
    try:
        while not at_work.exists():  # or the command ends at its own limit
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupted_run_says_what_it_saw(repository):
    """However long the report takes."""
    hangs = (
        f"    try:\n        Path({str(repository / 'at_work')!r}).touch()\n        time.sleep(250)\n"
        "    except KeyboardInterrupt:\n        time.sleep(12)\n        raise\n"
    )
    with started(repository, hangs) as process:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert outcomes(repository / "out.xml").items() >= {"test_passes[1]": "passed", "test_fails": "failure"}.items()
    assert "interrupted with 1 of 1 processes at work" in out


def test_a_second_interrupt_kills(repository):
    hangs = (
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"    Path({str(repository / 'at_work')!r}).touch()\n    time.sleep(250)\n"
    )
    with started(repository, hangs) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "interrupted with 1 of 1 processes at work\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "exit codes -9" in out
    assert outcomes(repository / "out.xml") == {}


def test_the_time_limit_interrupts_too(repository, capfd):
    assert gpu_tests.run(repository / "out.xml", repository, 1, 0) == 1
    assert "interrupted with 1 of 1 processes at work" in capfd.readouterr().out
    assert (repository / "out.xml").exists()


def test_a_report_that_was_cut_short_takes_no_other_with_it(tmp_path, capsys):
    whole, cut = tmp_path / "0.xml", tmp_path / "1.xml"
    whole.write_text('<testsuites><testsuite name="a"><testcase name="test_passes"/></testsuite></testsuites>')
    cut.write_text('<testsuites><testsuite name="b"><testcase na')
    gpu_tests.merge([cut, whole], tmp_path / "out.xml")
    assert outcomes(tmp_path / "out.xml") == {"test_passes": "passed"}
    assert "1.xml is no JUnit report" in capsys.readouterr().out
