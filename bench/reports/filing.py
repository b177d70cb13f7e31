"""File results as ``bench/results/<machine>/<date>-<commit>.json`` (against inference runtimes, ``runtimes-<date>...``) and
refresh everything generated from them."""

from __future__ import annotations

import re
from pathlib import Path

from lcconformer.runtime import read_json, write_atomically

from ..core.rows import Results
from . import RESULTS, goals, readme
from .evidence import EVIDENCE, record_report, record_rows

__all__ = ["file_results", "slug"]


def slug(name: str) -> str:
    """Folder name of a machine: ``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_results(
    source: Path, results: Path = RESULTS, readme_file: Path = readme.README, engines_file: Path = readme.ENGINES
) -> int:
    """File a result file, or the folder that ``bench/gpu.sh`` wrote.

    Args:
        source: a file written by ``--json``, or a folder with ``bench.json`` and, from a GPU, ``gpu_tests.xml``,
            ``machine.json``, ``kernels.json`` and ``profiles.json``.
        results: folder to file them in.
        readme_file, engines_file: README and page about engines whose generated parts are refreshed.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it holds no rows, or rows of an unknown commit or of a working tree with changes.
    """
    rows_file = source / "bench.json" if source.is_dir() else source
    if not rows_file.exists():
        raise FileNotFoundError(f"bench --import: {rows_file} does not exist; give a --json file or the OUT of gpu.sh")
    found = Results(rows_file)
    if not found.rows:
        raise ValueError(f"bench --import: {rows_file} holds no rows; nothing to file")
    commits = {row.commit for row in found.rows}
    bad = sorted(c for c in commits if c == "unknown" or c.endswith("-dirty"))
    if bad:
        raise ValueError(f"bench --import: rows of commit {', '.join(bad)}; only results of committed code are filed")
    for name in sorted({row.device_name for row in found.rows}):
        members = [row for row in found.rows if row.device_name == name]
        for commit in sorted({row.commit for row in members}):
            against = "runtimes-" if any(row.provider in readme.RUNTIMES for row in members) else ""
            target = results / slug(name) / f"{against}{found.date[:10]}-{commit}.json"
            filed = Results(target)
            filed.date = found.date
            filed.ceilings |= {k: v for k, v in found.ceilings.items() if k.startswith(name)}
            filed.skipped = found.skipped
            filed.add([row for row in members if row.commit == commit])
            print(f"filed {len(filed.rows)} rows: {target}")
            if not against:
                goals.write(filed, target.with_name("goals.md"))
                print(goals.table(filed.rows))
        constants = source / "machine.json"
        if source.is_dir() and constants.exists():
            values = read_json(constants)
            if values.get("device_name") == name:
                for part in (constants, source / "kernels.json", source / "profiles.json"):
                    if part.exists():
                        write_atomically(results / slug(name) / part.name, part.read_bytes())
    evidence = results / EVIDENCE.name
    record_rows(found.rows, found.date[:10], evidence)
    report = source / "gpu_tests.xml"
    if source.is_dir() and report.exists() and any(row.device == "cuda" for row in found.rows):
        row = next(row for row in found.rows if row.device == "cuda")
        origin = {"commit": row.commit, "date": found.date[:10], "machine": row.device_name}
        record_report(report, gpu=True, path=evidence, origin=origin)
    if readme_file.exists():
        readme.refresh(readme_file, engines_file, results)
        print(f"refreshed {readme_file}")
    return 0
