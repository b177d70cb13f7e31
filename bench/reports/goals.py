"""The project's performance goals against a result file: ``python -m lcconformer.bench.reports.goals FILE``.

A goal compares the fastest row of lcconformer with the fastest row of another provider on the same case of the same run.
Beside it stands how much of the floor our row reaches, by the rates measured on the same machine
(:mod:`~lcconformer.bench.core.roofline`), which tells an H100 from an H200 where the ratios do not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcconformer.runtime import write_atomically

from ..core.rows import Results, Row
from .table import grid, number

__all__ = ["GOALS", "Goal", "table", "write"]


@dataclass(frozen=True)
class Goal:
    """Be at least ``factor`` times as fast as ``against``, or, with ``memory``, need at most ``factor`` of its peak memory."""

    device: str
    mode: str
    batch: int
    frames: int
    d_model: int
    against: str
    factor: float
    memory: bool = False

    @property
    def layers(self) -> int:
        return 12 if self.device == "cuda" else 4

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    def __str__(self) -> str:
        case = f"{self.mode} B={self.batch} T={self.frames} d={self.d_model}"
        return f"{case}: memory of {self.against}" if self.memory else f"{case}: speed of {self.against}"

    def rows(self, rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
        """Our row and the other's: the fastest, for memory the fastest of those that know theirs (a CUDA graph does not)."""
        case = (self.mode, self.batch, self.frames, self.d_model, self.layers, self.dtype, self.device)
        members = [
            r
            for r in rows
            if (r.mode, r.batch, r.frames, r.d_model, r.layers, r.dtype, r.device) == case and r.depth == r.layers
            if (r.peak_memory_mb or not self.memory) and not r.beside
        ]
        ours, theirs = (
            min((r for r in members if r.provider == name), key=lambda r: r.median_ms, default=None)
            for name in ("lcconformer", self.against)
        )
        return ours, theirs

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The measured ratio; None if a row for it is missing."""
        ours, theirs = self.rows(rows)
        if ours is None or theirs is None:
            return None
        if not self.memory:
            return theirs.median_ms / ours.median_ms
        assert ours.peak_memory_mb is not None
        assert theirs.peak_memory_mb is not None
        return ours.peak_memory_mb / theirs.peak_memory_mb

    def met(self, ratio: float) -> bool:
        """Whether a measured ratio reaches the goal."""
        return ratio <= self.factor if self.memory else ratio >= self.factor


def _gpu() -> tuple[Goal, ...]:
    """Goals on an H100 or H200: factors against eager PyTorch and against torch.compile at widths 256, 512, 768."""
    factors = {
        ("inference", 1, 100): ((8.5, 7, 6), (2.6, 2.5, 2.3)),
        ("inference", 32, 400): ((4.2, 3.2, 2.7), (2.7, 2.2, 1.9)),
        ("inference", 32, 1500): ((5.7, 4.7, 4.0), (2.9, 2.5, 2.2)),
        ("training", 8, 400): ((4.5, 2.9, 2.3), (2.4, 1.9, 1.7)),
        ("training", 32, 400): ((3.2, 2.6, 2.2), (2.1, 1.8, 1.6)),
        ("training", 32, 1500): ((3.1, 2.9, 2.6), (1.8, 1.7, 1.6)),
    }
    speed = [
        Goal("cuda", *case, width, against, factor)
        for case, pair in factors.items()
        for against, of_widths in zip(("eager", "compile"), pair)
        for width, factor in zip((256, 512, 768), of_widths)
    ]
    memory = [
        Goal("cuda", "training", 32, frames, 256, "eager", factor, memory=True)
        for frames, factor in ((400, 0.35), (1500, 0.2))
    ]
    return (*speed, *memory)


# on two cores: never slower than eager, and faster where there is much to compute
_CPU = tuple(
    Goal("cpu", mode, batch, frames, 256, against, factor, memory)
    for mode, batch, frames, against, factor, memory in (
        ("inference", 1, 100, "eager", 1.0, False),
        ("inference", 1, 400, "eager", 1.0, False),
        ("inference", 8, 400, "eager", 1.8, False),
        ("inference", 8, 400, "transformers", 1.5, False),
        ("inference", 8, 400, "torchaudio", 1.0, False),
        ("inference", 2, 1500, "eager", 3.2, False),
        ("inference", 2, 1500, "transformers", 2.0, False),
        ("training", 8, 400, "eager", 1.4, False),
        ("training", 2, 1500, "eager", 0.5, True),
    )
)
GOALS = (*_gpu(), *_CPU)


def table(rows: Sequence[Row]) -> str:
    """The goals for the devices of the rows as a table; a goal whose rows are missing is listed as not measured."""
    devices = {row.device for row in rows}
    lines = []
    for goal in GOALS:
        if goal.device not in devices:
            continue
        ratio = goal.measured(rows)
        verdict = "not measured" if ratio is None else "met" if goal.met(ratio) else "MISSED"
        bound = f"<= {number(goal.factor)}" if goal.memory else f">= {number(goal.factor)}x"
        ours = None if goal.memory else goal.rows(rows)[0]
        reached = number(None if ours is None else ours.percent_of_roofline, "%")
        lines.append([str(goal), bound, number(ratio, "" if goal.memory else "x"), reached, verdict])
    return grid(["goal", "wanted", "measured", "of ceiling", ""], lines)


def write(results: Results, path: Path) -> None:
    """Write the table of a result file as Markdown."""
    first = results.rows[0]
    title = f"Goals on {first.device_name}, {results.date[:10]}, commit {first.commit}"
    write_atomically(path, f"{title}\n\n```\n{table(results.rows)}\n```\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.reports.goals", description=__doc__)
    parser.add_argument("file", type=Path, help="a result file of python -m lcconformer bench --json")
    args = parser.parse_args(argv)
    if not args.file.exists():
        print(f"bench.goals: {args.file} does not exist; give a --json file of the suite", file=sys.stderr)
        return 2
    print(table(Results(args.file).rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
