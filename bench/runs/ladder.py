"""The ladder: what each part of the algorithm gains, and the product of the gains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import lcconformer
from lcconformer.ops.registry import BACKENDS
from lcconformer.runtime import commit

from ..core.case import Case
from ..core.rows import device_name
from ..core.timing import time_interleaved
from ..providers.registry import Provider, eager, library
from ..reports.table import grid, number
from .gate import Gate, GateError
from .runner import Runner
from .suite import Skip, prepare

__all__ = ["Rung", "climb", "ladder", "shallow_depth"]

# from the abstract, which does not say how it defines speedup
PAPER = "the paper (arXiv 2105.00812): 7.8x fewer parameters, 41.9% training speedup, 37.7% inference speedup"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder and its time in milliseconds."""

    name: str
    ms: float


def shallow_depth(layers: int) -> int:
    """Loops of shallow inference: five eighths of N, which saves 37.5% of the loops (the paper saves 37.7% of the time)."""
    return max(1, round(layers * 5 / 8))


def _unshared(case: Case):
    return library(case, sharing="none")


def _fused(case: Case, gate: Gate, sharing: str) -> Runner:
    """lcconformer on the first backend, and with shared weights on the first engine, that can run the case.

    Raises:
        ValueError: none can.
    """
    build, ways = _unshared, [("modules", False)]
    if sharing == "all":
        build, ways = library, [("loop", False), ("modules", False)]
        if case.device == "cuda":
            # the inference engine captures a graph of its own and cannot be captured in another
            ways = [("loop", True), ("loop", False), ("modules", True)]
    reasons = []
    for backend in BACKENDS:
        if backend == "triton" and case.device == "cpu":
            continue  # could only be interpreted
        for engine, graphs in ways:
            provider = Provider(
                "lcconformer", backend, build, _here(backend), forced=backend, engine=engine, graphs=graphs
            )
            try:
                return prepare(provider, case, gate)
            except (Skip, GateError) as error:
                reasons.append(f"{backend}, {engine}: {error}")
    raise ValueError("bench --ladder: no backend of lcconformer serves this case: " + "; ".join(reasons))


def _here(backend: str):
    from ..providers.registry import PROVIDERS

    return next(p.missing for p in PROVIDERS if p.name == "lcconformer" and p.backend == backend)


def climb(case: Case, depth: int, seconds: float, rounds: int | None) -> list[Rung]:
    """Time the rungs, from plain PyTorch to all parts together.

    Args:
        case: an encoder at full depth, ``case.depth == case.layers``.
        depth: loops of shallow inference; not used in training, which averages over all depths.
        seconds, rounds: see :func:`~lcconformer.bench.core.timing.time_interleaved`.
    """
    gate = Gate(case)
    unshared = _fused(case, gate, "none")
    runners = {"eager": prepare(eager, case, gate), "fused": unshared}
    depths = range(1, case.layers + 1) if case.backward else (depth, case.layers)
    for k in dict.fromkeys(depths):
        runners[f"depth {k}"] = _fused(case.replace(depth=k), gate, "all")
    ms = {name: t.median for name, t in time_interleaved(runners, case.device, seconds, rounds).items()}
    shared = runners[f"depth {case.layers}"].provider
    loop = "shared weights" + (", loop engine" if shared.engine == "loop" else ", loop of modules")
    loop += " in a CUDA graph" if shared.graphs else ""
    rungs = [
        Rung("plain PyTorch, unshared", ms["eager"]),
        Rung(f"+ lcconformer's layer ({unshared.provider.forced} backend)", ms["fused"]),
        Rung(f"+ {loop}", ms[f"depth {case.layers}"]),
    ]
    if case.backward:
        sampled = statistics.mean(ms[f"depth {k}"] for k in depths)
        rungs.append(Rung(f"+ depth sampled from U{{1..{case.layers}}} (mean over all depths)", sampled))
    else:
        rungs.append(Rung(f"+ shallow inference, {depth} of {case.layers} loops", ms[f"depth {depth}"]))
    return rungs


def ladder(cases: Sequence[Case], seconds: float | None, rounds: int | None) -> int:
    """Print the ladder of each case.

    Raises:
        ValueError: the cases are ops, or no backend can run one of them.
    """
    if cases[0].op:
        raise ValueError("bench --ladder: mode is ops; use --mode inference or training")
    print(f"{device_name(cases[0].device)}; commit {commit()}")
    for case in cases:
        # --depth sets the shallow depth; the other rungs run all N loops
        depth = case.depth if case.depth < case.layers else shallow_depth(case.layers)
        rungs = climb(case.replace(depth=case.layers), depth, seconds or 15.0, rounds)
        print(f"\n{case}")
        print(grid(["step", "ms", "factor", "product", "time saved"], _lines(rungs), left=1))
        config = lcconformer.ConformerConfig(
            d_model=case.d_model, num_heads=case.num_heads, ffn_dim=case.ffn_dim, num_layers=case.layers
        )
        summary = lcconformer.ConformerEncoder(config).summary(case.frames)
        print(
            f"parameters: {summary.effective:,} without sharing, {summary.unique:,} shared: {summary.ratio:.1f}x fewer"
        )
    print(
        f"\n{PAPER}\nfactor, product: throughput ratio, old time / new time (a 41.9% higher throughput is 1.42x); "
        "time saved: 1 - new / old (41.9% of the time saved is 1.72x)"
    )
    return 0


def _lines(rungs: Sequence[Rung]) -> list[list[str]]:
    lines, first, previous = [], rungs[0].ms, rungs[0].ms
    for rung in rungs:
        factor, product = previous / rung.ms, first / rung.ms
        saved = f"{100 * (1 - rung.ms / first):.1f}%"
        lines.append([rung.name, number(rung.ms), f"{factor:.2f}x", f"{product:.2f}x", saved])
        previous = rung.ms
    return lines
