"""The evidence table: which steps each kernel has passed, taken from test reports and result files, never by hand.

    pytest --junitxml report.xml ; python -m lcconformer.bench.reports.evidence report.xml
    pytest -m gpu --junitxml gpu.xml ; python -m lcconformer.bench.reports.evidence --gpu gpu.xml

Steps: *reference* (float64 oracle, gradcheck, opcheck), *interpreted* (Triton kernels on a CPU), *emulated* (CUDA sources on
a CPU), *compiled* (for every shipped architecture), *executed* (the compiled PTX on a CPU, see tests/ptx), *on a GPU* (the
same grid of tests there), *timed* (rows of the suite).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lcconformer.runtime import commit, read_json, write_atomically

from ..core.case import OPS
from ..core.rows import Row, device_name
from . import RESULTS
from .table import grid

__all__ = ["EVIDENCE", "STEPS", "load", "read_report", "record_report", "record_rows", "table"]

EVIDENCE = RESULTS / "evidence.json"
STEPS = ("reference", "interpreted", "emulated", "compiled", "executed", "on a GPU", "timed")
# the module of a test decides which step it proves; the first match counts
_PLACES = (
    ("executed", re.compile(r"^tests\.ptx\.test_kernels\.")),
    ("compiled", re.compile(r"^tests\.(kernels\.test_(report|specialisations)|extension\.test_resources)\.")),
    ("emulated", re.compile(r"^tests\.extension\..*emulated")),
    ("interpreted", re.compile(r"^tests\.(kernels\.|loop\.test_chain\.)")),
    ("reference", re.compile(r"^tests\.ops\.")),
)
_LARGEST_REPORT = 1 << 23  # bytes; the elements may take 30 times as much
# the chain's kernels (lcconformer.loop.chain) are not ops: products, LayerNorm and convolution of inference, and their loop
_TRITON = (*OPS, "chain")
ROWS = (*_TRITON, "cluster_loop")
# covers every kernel of Triton
_ALL = re.compile(r"\.test_report\.test_budgets\b")


def load(path: Path = EVIDENCE) -> dict[str, dict[str, dict[str, Any]]]:
    """The table as ``{op: {step: entry}}``; empty before anything is recorded."""
    return read_json(path) if path.exists() else {}


def read_report(path: Path) -> ElementTree.Element:
    """The root of a JUnit report of pytest, of at most 8 MB.

    Raises:
        ValueError: the file is larger, or no such report.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST_REPORT + 1)
    try:
        if len(content) > _LARGEST_REPORT:
            raise ValueError(f"it has more than {_LARGEST_REPORT} bytes")
        return ElementTree.fromstring(content)
    except (ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"evidence: {path} is no JUnit report ({error}); write one with pytest --junitxml") from error


def record_report(
    report: Path, gpu: bool = False, path: Path = EVIDENCE, origin: dict[str, str] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Record the counts of a JUnit report of pytest and return the new table; steps without tests in the report stay.

    Args:
        report: file written by ``pytest --junitxml``.
        gpu: whether the run was ``pytest -m gpu`` on a GPU; then all of it counts for that step.
        path: file of the table.
        origin: commit, date and machine of the run; None for this commit, today and this machine.

    Raises:
        ValueError: the file is no such report, or none of its tests that ran is about a row of the table.
    """
    cases = list(read_report(report).iter("testcase"))
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for case in cases:
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        step = "on a GPU" if gpu else next((s for s, place in _PLACES if place.search(name)), None)
        if step is None:
            continue
        outcome = "passed"
        for child in case:
            outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(child.tag, outcome)
        for op in _TRITON if _ALL.search(name) else [op for op in ROWS if op in name]:
            count = counts.setdefault((op, step), {"passed": 0, "failed": 0, "skipped": 0})
            count[outcome] += 1
    # a step whose tests were all skipped proves nothing
    counts = {key: count for key, count in counts.items() if count["passed"] + count["failed"]}
    if not counts:
        raise ValueError(f"evidence: no test in {report} ran that is about {', '.join(ROWS)}")
    found = load(path)
    origin = origin or _origin("cuda" if gpu else "cpu")
    for (op, step), count in counts.items():
        found.setdefault(op, {})[step] = {**count, **origin}
    write_atomically(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def _origin(device: str) -> dict[str, str]:
    return {"commit": commit(), "date": datetime.date.today().isoformat(), "machine": device_name(device)}


def record_rows(rows: Iterable[Row], date: str, path: Path = EVIDENCE) -> None:
    """Record the best percentage of the roofline that each op of lcconformer reaches in GPU rows."""
    found = load(path)
    best: dict[str, Row] = {}
    for row in rows:
        op = row.mode.partition(":")[0]
        ours = row.device == "cuda" and row.provider == "lcconformer" and row.backend != "torch"
        if op in OPS and ours and (op not in best or row.percent_of_roofline > best[op].percent_of_roofline):
            best[op] = row
    for op, row in best.items():
        found.setdefault(op, {})["timed"] = {
            "passed": 1, "failed": 0, "skipped": 0,
            "commit": row.commit, "date": date, "machine": row.device_name,
            "percent_of_roofline": row.percent_of_roofline,
        }  # fmt: skip
    if best:
        write_atomically(path, json.dumps(found, indent=1, sort_keys=True) + "\n")


def table(path: Path = EVIDENCE) -> str:
    """The table as text: tests passed of those that ran for each op and step, and the machines they ran on."""
    found = load(path)
    if not found:
        return "no evidence is recorded; run pytest --junitxml F and python -m lcconformer.bench.reports.evidence F"
    lines = [[op, *(_cell(found.get(op, {}).get(step)) for step in STEPS)] for op in ROWS]
    origins = sorted(
        {
            f"{e['date']} {e['commit']} on {e['machine']}: {step}"
            for steps in found.values()
            for step, e in steps.items()
        }
    )
    return grid(["kernels", *STEPS], lines) + "\n" + "\n".join(origins)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if "percent_of_roofline" in entry:
        return f"{entry['percent_of_roofline']:.0f}% of floor"
    ran = entry["passed"] + entry["failed"]
    return f"{entry['passed']} of {ran}" if entry["failed"] else f"{ran} pass"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.reports.evidence", description=__doc__)
    parser.add_argument("report", type=Path, nargs="+", help="JUnit reports of pytest")
    parser.add_argument("--gpu", action="store_true", help="the reports come from pytest -m gpu on a GPU")
    args = parser.parse_args(argv)
    try:
        for report in args.report:
            record_report(report, args.gpu)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
