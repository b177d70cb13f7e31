"""Interleaved timing: each round calls every provider once, in rotating order, so that a slow spell affects all alike."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Timing", "flush_l2", "free_memory", "peak_memory_mb", "quiet", "time_interleaved", "time_once"]

MIN_ROUNDS, MAX_ROUNDS = 5, 100
# threads of OpenMP (libgomp) wait for work in 300,000 turns of a loop, some milliseconds, before they sleep
SPIN_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile of the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


_flush: dict[int, torch.Tensor] = {}


def flush_l2() -> None:
    """Overwrite the L2 cache of the GPU, so that the next call finds neither input nor weights there; waits until done."""
    device = torch.cuda.current_device()
    if device not in _flush:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        _flush[device] = torch.empty(max(size, 1 << 26) // 4, device="cuda")
    _flush[device].zero_()
    torch.cuda.synchronize()


def time_once(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call with its launches: by CUDA events and from a cold L2, or by the wall clock on a CPU."""
    if device == "cuda":
        flush_l2()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    rounds: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    apart: bool = False,
) -> dict[str, Timing]:
    """Time all calls in turn; the caller has warmed them up.

    Args:
        calls: what to time, by name.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: budget for the rounds, of which there are at least 5 and at most 100.
        rounds: run exactly this many instead.
        progress: called after each round with the number done and the number expected.
        apart: pause before each call until no thread of the last one spins any more, and call once untimed so that its own
            threads are awake and its caches warm: for calls that bring threads of their own.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin, done = time.perf_counter(), 0
    while names:
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            if apart:
                time.sleep(SPIN_SECONDS)
                calls[name]()
            samples[name].append(time_once(calls[name], device))
        done += 1
        spent = time.perf_counter() - begin
        expected = rounds or min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds * done / spent)))
        progress(done, expected)
        if done >= expected:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what is written to file descriptor 2: the native profiler reports there that it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def free_memory(device: str) -> float:
    """Bytes that are free on the device; infinite where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    about = Path("/proc/meminfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def peak_memory_mb(call: Callable[[], object], device: str) -> float:
    """Peak memory of one call in MB, beyond what torch's allocator held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    from torch.profiler import ProfilerActivity, profile

    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = peak = 0
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6
