"""Regression check: time this working tree against another commit, interleaved, on the same machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..core.case import Case
from ..core.timing import MAX_ROUNDS, MIN_ROUNDS, Timing
from ..reports.table import grid, number

__all__ = ["compare", "install"]

_PATIENCE = 60.0  # seconds from the last request to the end of a worker, before it is aborted


def _git(*arguments: str, cwd: Path) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("bench --compare: git is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"bench --compare: git {' '.join(arguments)}: {error.stderr.strip()}") from error
    return done.stdout.strip()


def install(tree: Path, site: Path, say: Callable[[str], None] = print) -> None:
    """Install the package of a source tree into the folder ``site``, without its extension if that does not build.

    Args:
        tree: a checkout.
        site: what goes to PYTHONPATH.
        say: called with a line if the extension is missing.
    """
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run([*command, "--target", str(site), str(tree)], capture_output=True, text=True)
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    say(f"pip could not install {tree} ({last}); comparing without the extension")
    for source, target in (("lcconformer", "lcconformer"), ("kernels", "lcconformer/kernels")):
        if (tree / source).exists():
            shutil.copytree(tree / source, site / target, dirs_exist_ok=True)


@contextlib.contextmanager
def _worker(site: Path, case: Case) -> Iterator[Callable[[], float]]:
    """Start a process that uses the package in ``site``; yields a function that makes one call there and returns its ms."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("compare_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def ask(line: str) -> str:
        requests.write(line + "\n")
        requests.flush()
        answer = answers.readline()
        if not answer:
            raise ValueError(f"bench --compare: the process on {site} ended with code {process.wait()}; see above")
        return answer

    sizes = asdict(case) | {"num_heads": case.num_heads, "ffn_dim": case.ffn_dim, "threads": torch.get_num_threads()}
    try:
        ask(json.dumps(sizes))
        yield lambda: float(ask("call"))
    finally:
        requests.close()
        answers.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait()


def compare(ref: str, cases: Sequence[Case], seconds: float | None, rounds: int | None) -> int:
    """Print the ratio of the two medians for each case; returns 0, the exit status.

    Raises:
        ValueError: a case cannot be compared, git does not know ``ref``, or a process died.
    """
    if any(case.op or case.dtype == "amp" for case in cases):
        raise ValueError("bench --compare: encoders only, --mode inference or training, and no --dtype amp")
    root = Path(_git("rev-parse", "--show-toplevel", cwd=Path(__file__).resolve().parent))
    name = _git("rev-parse", "--short", ref, cwd=root)
    lines = []
    with tempfile.TemporaryDirectory(prefix="lcconformer-compare-") as folder:
        here, there, tree = (Path(folder) / n for n in ("here", "there", "tree"))
        _git("worktree", "add", "--detach", "-q", str(tree), ref, cwd=root)
        try:
            install(root, here)
            install(tree, there)
            for case in cases:
                with _worker(here, case) as new, _worker(there, case) as old:
                    timings = _interleave({"new": new, "old": old}, seconds or 10.0, rounds)
                ratio = timings["old"].median / timings["new"].median
                spread = max((t.p80 - t.p20) / t.median for t in timings.values())
                old_ms, new_ms = (number(timings[n].median) for n in ("old", "new"))
                lines.append([str(case), old_ms, new_ms, f"{ratio:.3f}x", f"{100 * spread:.0f}%"])
        finally:
            _git("worktree", "remove", "--force", str(tree), cwd=root)
    print(grid(["case", f"{name} ms", "working tree ms", "speedup", "spread"], lines))
    print("spread: p20 to p80 over the median, the larger of both; a speedup within it is noise")
    return 0


def _interleave(calls: dict[str, Callable[[], float]], seconds: float, rounds: int | None) -> dict[str, Timing]:
    """Call both workers in turn and summarise the milliseconds that they report.

    Unlike :func:`~lcconformer.bench.core.timing.time_interleaved`, which takes the time itself: these times exclude the pipe.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    count = rounds or MAX_ROUNDS
    spent = 0.0
    for i in range(count):
        for name in sorted(calls, reverse=bool(i % 2)):
            samples[name].append(calls[name]())
            spent += samples[name][-1] / 1e3
        if rounds is None and i + 1 >= MIN_ROUNDS and spent > seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}
