"""Run the GPU tests in several processes: ``python -m lcconformer.bench.gpu.gpu_tests OUT.xml REPOSITORY [--seconds S]``.

Nearly all of their time goes into compiling kernels, on one core a process. Tests of one set of kernels stay together
(tests/conftest.py), so that no two processes compile the same. After S seconds the processes are interrupted, and
OUT.xml says what they had seen by then. An interrupt (Ctrl-C) does the same at once; a second one kills them, and OUT.xml
holds what was reported before it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from lcconformer.runtime import write_atomically

from ..reports.evidence import read_report

__all__ = ["merge", "run"]

FOLDERS = ("ops", "kernels", "extension", "loop")
# exit codes of pytest: all passed, and no tests in this share
_FINE = (0, 5)
# seconds for the report after an interrupt: pytest writes it once the compilation or test at hand has ended, and it is far
# quicker than this unless that never ends
_GRACE = 120


def run(out: Path, repository: Path, processes: int, seconds: float) -> int:
    """Run ``pytest -m gpu`` in shares, print their output and merge their reports.

    Args:
        out: the merged report.
        repository: checkout whose tests run.
        processes: number of shares.
        seconds: time after which they are interrupted.

    Returns:
        The exit status: 1 if anything failed.
    """
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(repository / "pyproject.toml"),
        "--rootdir", str(repository), "-m", "gpu", "--continue-on-collection-errors",
        *(str(repository / "tests" / folder) for folder in FOLDERS),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{i}.xml" for i in range(processes)]
        logs = [report.with_suffix(".txt") for report in reports]
        running = []
        for i, (report, log) in enumerate(zip(reports, logs)):
            env = {**os.environ, "LCCONFORMER_TEST_SHARD": f"{i}/{processes}"}
            with log.open("wb") as stream:
                # a new session each, so that Ctrl-C reaches only this process, which interrupts them once
                running.append(
                    subprocess.Popen(
                        [*command, "--junitxml", str(report)],
                        stdout=stream,
                        stderr=stream,
                        env=env,
                        start_new_session=True,
                    )
                )
        codes = _wait(running, seconds)
        merge((report for report in reports if report.exists()), out)
        for log in logs:
            print(log.read_text(errors="replace"))
    print(f"{processes} processes: exit codes {', '.join(map(str, codes))}")
    return int(any(code not in _FINE for code in codes))


def _wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes. Those at work after ``seconds``, or when this process is interrupted, are interrupted and awaited; those
    still at work after the grace period, or a second interrupt, are killed."""
    end = time.monotonic() + seconds
    try:
        for process in running:
            process.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        working = [process for process in running if process.poll() is None]
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            print(f"interrupted with {len(working)} of {len(running)} processes at work", flush=True)
            for process in working:
                process.send_signal(signal.SIGINT)
            end = time.monotonic() + _GRACE
            for process in working:
                process.wait(max(0.0, end - time.monotonic()))
        for process in working:
            process.kill()  # does nothing to those that have ended
    return [process.wait() for process in running]


def merge(reports: Iterable[Path], out: Path) -> None:
    """Write the suites of several JUnit reports to one; a report that was cut short is left out, and a line says so."""
    whole = ElementTree.Element("testsuites")
    for report in reports:
        try:
            whole.extend(read_report(report).iter("testsuite"))
        except ValueError as error:
            print(f"{error}; its tests are missing from {out.name}")
    write_atomically(out, ElementTree.tostring(whole, encoding="unicode"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.gpu_tests", description=__doc__)
    parser.add_argument("out", type=Path, help="the merged report")
    parser.add_argument("repository", type=Path, help="the checkout that holds tests/")
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument(
        "--seconds", type=float, default=600, help="interrupt them after this time (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    return run(args.out, args.repository.resolve(), args.processes, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
