"""Time the encoders of a phase and profile ours: ``python -m lcconformer.bench.gpu.encoders OUT --phase 4``."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcconformer.runtime import read_json, write_atomically

from ..core.rows import Results, Row
from ..providers.registry import build, choose
from ..runs.ladder import ladder
from ..runs.runner import Runner
from ..runs.suite import run_case
from .cases import Timed, timed
from .items import Items
from .profiles import kernels_of, table

__all__ = ["time_and_profile"]


def time_and_profile(one: Timed, out: Path, small: bool) -> dict[str, float] | None:
    """Add the rows of a case to OUT/bench.json and the kernels of our fastest provider to OUT/profiles.json.

    Returns:
        Median milliseconds by provider; None for the ladder, which prints its own.

    Raises:
        RuntimeError: no provider could be timed.
    """
    seconds, rounds = 2.0, 1 if small else None
    if one.ladder:
        ladder([one.case], seconds, rounds)
        return None
    rows = run_case(one.case, choose(one.providers), Results(out / "bench.json"), seconds=seconds, rounds=rounds)
    if not rows:
        raise RuntimeError(f"{one}: no provider could be timed; the reasons are above and in bench.json")
    ours = [row for row in rows if row.provider == "lcconformer"]
    if ours:
        _profile(one, min(ours, key=lambda row: row.median_ms), out)
    return {f"{row.provider}:{row.backend}": row.median_ms for row in rows}


def _profile(one: Timed, row: Row, out: Path) -> None:
    (provider,) = choose(f"{row.provider}:{row.backend}")
    case = one.case
    runner = Runner(provider, case, build(provider, case, None))
    runner.prepare()
    kernels = kernels_of(runner, case.device, 3 if case.device == "cuda" else 1)
    print(f"\n{one}, {provider}: {row.median_ms:.3f} ms, of these in kernels:\n{table(kernels)}", flush=True)
    path = out / "profiles.json"
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    known[str(one)] = {"provider": str(provider), "median_ms": row.median_ms, "kernels": kernels[:60]}
    write_atomically(path, json.dumps(known, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.encoders", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--phase", type=int, choices=(4, 6, 7), required=True)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    args = parser.parse_args(argv)
    todo = {
        str(one): functools.partial(time_and_profile, one, args.out, args.small)
        for one in timed(args.phase, args.small)
    }
    return Items(args.out, args.phase).run(todo)


if __name__ == "__main__":
    sys.exit(main())
