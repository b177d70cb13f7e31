"""Six kernels under Nsight Compute: ``python -m lcconformer.bench.gpu.ncu OUT``; what it saw goes to OUT/kernels.json."""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .kernels import keep

__all__ = ["parse"]

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")


def parse(lines: Iterable[str]) -> dict[str, dict[str, str]]:
    """``ncu --csv --page details`` -> kernel and its number -> metric and its unit -> value."""
    # what the program and ncu print comes before the header
    kept = [line for line in lines if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(kept):
        kernel = found.setdefault(f"{row['ID']} {row['Kernel Name']}", {})
        if row.get("Metric Name"):
            kernel[f"{row['Metric Name']} {row['Metric Unit']}".strip()] = row["Metric Value"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.ncu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        print("missing: ncu on PATH")
        return 0
    command = [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details",
        *(part for section in SECTIONS for part in ("--section", section)),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        program = [sys.executable, "-m", "lcconformer.bench.gpu.kernels", str(args.out), "--once"]
        code = subprocess.run([*command, "--log-file", str(log), *program]).returncode
        text = log.read_text(errors="replace") if log.exists() else ""
    found = parse(text.splitlines())
    keep(args.out, "ncu", found)
    if not found:
        print(f"ncu reported no kernel (code {code}): {text[-500:]}", file=sys.stderr)
    for kernel, values in found.items():
        shown = [f"{name} = {value}" for name, value in values.items() if "Duration" in name or "Throughput" in name]
        print(f"{kernel}: {', '.join(shown)}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
