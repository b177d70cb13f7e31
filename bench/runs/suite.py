"""The suite: build the providers of a case, check them, time them together, and make rows of the results."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from lcconformer.ops.registry import record
from lcconformer.runtime import commit

from ..core.case import FRAME_SECONDS, Case
from ..core.roofline import Ceilings, floor_ms, measure_ceilings, work
from ..core.rows import Results, Row, device_name, versions
from ..core.timing import MIN_ROUNDS, Timing, free_memory, peak_memory_mb, time_interleaved
from ..providers.registry import Provider, build
from .gate import Gate, GateError
from .runner import Runner

__all__ = ["Skip", "ceilings_of", "prepare", "run_case"]


class Skip(Exception):
    """A provider cannot run a case; the message says why."""


def ceilings_of(case: Case, results: Results) -> Ceilings:
    """Ceilings of the case's device and dtype, measured once per result file and machine."""
    key = f"{device_name(case.device)} {case.dtype}"
    if key not in results.ceilings:
        measured = measure_ceilings(case)
        results.ceilings[key] = {"gemm_tflops": measured.gemm_tflops, "copy_gb_s": measured.copy_gb_s}
        results.save()
    return Ceilings(**results.ceilings[key])


def prepare(provider: Provider, case: Case, gate: Gate) -> Runner:
    """Build a provider, check it and warm it up.

    Raises:
        Skip: the provider cannot run this case.
        GateError: its numbers are wrong.
    """
    reason = "has no form in 8 bits" if case.dtype == "int8" and not provider.int8 else provider.missing(case)
    reason = reason or _too_large(provider, case)
    if reason is not None:
        raise Skip(reason)
    try:
        with record() as served:
            runner = Runner(provider, case, build(provider, case, gate.state(provider)))
            if not case.backward:
                # before the check, which then sees the replay of a CUDA graph
                runner.prepare()
            gate.check(runner)
            if case.backward:
                runner.prepare()
    except NotImplementedError as error:
        raise Skip(str(error)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise Skip("out of memory") from error
    if provider.forced not in (None, "torch") and provider.forced not in served.values():
        raise Skip(f"no kernel of backend {provider.forced} ran")
    return runner


def _too_large(provider: Provider, case: Case) -> str | None:
    """Say that the scores of attention do not fit the memory that is free; None: they may."""
    if case.op or not provider.scores:
        return None
    needed = provider.scores * case.batch * case.num_heads * case.frames**2 * case.element_size
    free = free_memory(case.device)
    if needed < free:
        return None
    return f"its scores of attention take {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def run_case(
    case: Case,
    providers: Sequence[Provider],
    results: Results,
    *,
    depths: Sequence[int] = (),
    seconds: float = 3.0,
    rounds: int | None = None,
    beside: str = "",
    step: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure all providers on one case, interleaved, add their rows to the results and return them.

    A provider gets a first row of few rounds as soon as it is ready, so that a run cut short keeps it; the row of the
    interleaved rounds replaces it.

    Args:
        case: what to run; its depth applies to lcconformer.
        providers: what to time; those that cannot run are skipped with a reason, those that are wrong get no row.
        results: takes rows and reasons.
        depths: further depths of lcconformer, with a row each.
        seconds, rounds: see :func:`~lcconformer.bench.core.timing.time_interleaved`.
        beside: what else runs on the cores, for the rows.
        step: called with a description of each step: one per provider and depth, and one for the timing.
        say: called with a line for everything that is skipped, wrong or failed.
    """
    ceilings = ceilings_of(case, results)
    gate = Gate(case)
    ready: dict[str, Runner] = {}
    memory: dict[str, float | None] = {}
    first: dict[str, Timing] = {}
    for provider in providers:
        own = [case.layers]
        if provider.name == "lcconformer" and not case.op:
            own = list(dict.fromkeys((case.depth, *depths)))
        for depth in own:
            step(f"{case}: checking {provider}")
            label = f"{provider} depth {depth}"
            try:
                runner = prepare(provider, case.replace(depth=depth), gate)
                memory[label] = _peak_memory(runner)
                first |= time_interleaved({label: runner}, case.device, 0.0, MIN_ROUNDS if case.device == "cuda" else 1)
                ready[label] = runner
                results.add([_row(runner, first[label], memory[label], _eager(ready, first), ceilings, beside)])
            except Skip as skip:
                if results.skip(str(provider), str(case), str(skip)):
                    say(f"skipped  {provider}: {skip}")
            except GateError as error:
                results.skip(str(provider), str(case), f"wrong: {error}")
                say(f"WRONG    {provider} on {case}: {error}; no time is given")
            except Exception as error:
                # peers and compilers may fail in any way; the other providers still count
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                results.skip(str(provider), str(case), f"failed: {reason}")
                say(f"FAILED   {provider} on {case}: {reason}")
    step(f"{case}: timing")
    apart = any(runner.provider.foreign for runner in ready.values())
    timings = time_interleaved(ready, case.device, seconds, rounds, apart=apart)
    eager = _eager(ready, timings)
    rows = [_row(runner, timings[label], memory[label], eager, ceilings, beside) for label, runner in ready.items()]
    results.add(rows)
    ready.clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _eager(ready: Mapping[str, Runner], timings: Mapping[str, Timing]) -> float | None:
    """Median of plain PyTorch, if it took part."""
    return next((timings[label].median for label, runner in ready.items() if runner.provider.name == "eager"), None)


def _peak_memory(runner: Runner) -> float | None:
    """Peak memory in MB; None for a captured graph, which keeps its memory and allocates nothing in a call, and for a runtime
    that allocates beside PyTorch."""
    unknown = runner.provider.graphs or runner.provider.foreign
    return None if unknown else peak_memory_mb(runner, runner.case.device)


def _row(
    runner: Runner, timing: Timing, memory: float | None, eager: float | None, ceilings: Ceilings, beside: str
) -> Row:
    case, provider = runner.case, runner.provider
    seconds = timing.median / 1e3
    tokens = case.batch * case.frames
    needed = work(case, provider.position)
    return Row(
        provider=provider.name,
        backend=provider.backend,
        mode=case.mode,
        batch=case.batch,
        frames=case.frames,
        d_model=case.d_model,
        layers=case.layers,
        depth=case.depth,
        dtype=case.dtype,
        device=case.device,
        device_name=device_name(case.device),
        versions=versions(),
        commit=commit(),
        median_ms=timing.median,
        p20_ms=timing.p20,
        p80_ms=timing.p80,
        tokens_per_s=tokens / seconds,
        rtf=None if case.op else seconds / (tokens * FRAME_SECONDS),
        peak_memory_mb=memory,
        tflops=needed.flops / seconds / 1e12,
        gb_per_s=needed.bytes / seconds / 1e9,
        percent_of_roofline=100 * floor_ms(needed, ceilings) / timing.median,
        speedup_vs_eager=None if eager is None else eager / timing.median,
        beside=beside,
    )
