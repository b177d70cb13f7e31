"""The threads of the inference kernels: many callers at once, children of fork, and calls that come after a rest."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .cpu_kernels import CPU, kernels
from .test_cpu_rows import PARTS, make, run


def test_every_caller_gets_its_own_result():
    """Callers of different work, at once and in turn, on more threads than there are cores."""
    cases = [make(m, 24, 300, 40) for m in (1, 60, 203, 400)]
    alone = [run(v, PARTS, threads=1) for v in cases]

    def call(n: int) -> bool:
        which = n % len(cases)
        return all(map(torch.equal, run(cases[which], PARTS, threads=8), alone[which]))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(200)))
    assert all(map(call, range(200)))


def test_helpers_wake_up_from_their_sleep():
    v = make(203, 24, 300, 40)
    alone = run(v, PARTS, threads=1)
    for pause in (0.0, 0.0001, 0.001, 0.05) * 5:
        time.sleep(pause)
        assert all(map(torch.equal, run(v, PARTS, threads=3), alone))


def _in_child(queue, v, alone) -> None:
    same = all(map(torch.equal, run(v, PARTS, threads=3), alone))
    queue.put((same, len(os.listdir("/proc/self/task"))))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux lists them")
def test_a_child_of_fork_has_threads_of_its_own():
    v = make(203, 24, 300, 40)
    with kernels(None, 1):
        alone = run(v, PARTS, threads=3)
        fork = multiprocessing.get_context("fork")
        queue = fork.SimpleQueue()
        child = fork.Process(target=_in_child, args=(queue, v, alone), daemon=True)
        child.start()
        child.join(120)
        assert child.exitcode == 0, "the child hangs, or failed"
        assert queue.get() == (True, 3)


def _cores_of_helpers(queue, v) -> None:
    run(v, PARTS, threads=3)
    before = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
    time.sleep(0.05)  # they sleep by now
    run(v, PARTS, threads=3)
    queue.put([sorted(os.sched_getaffinity(int(helper))) for helper in before])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", set)(0)) < 2, reason="needs two cores")
def test_helpers_wake_up_on_other_cores_than_the_caller_s():
    v = make(203, 24, 300, 40)
    with kernels(None, 1):
        fork = multiprocessing.get_context("fork")
        queue = fork.SimpleQueue()
        child = fork.Process(target=_cores_of_helpers, args=(queue, v), daemon=True)
        child.start()
        child.join(120)
        assert child.exitcode == 0, "the child hangs, or failed"
        first, second = queue.get()
    assert first == second
    assert len(first) == len(os.sched_getaffinity(0)) - 1
    assert set(first) < os.sched_getaffinity(0)


def _ran_for(queue, v, alone) -> None:
    def nanoseconds() -> dict[str, int]:
        threads = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
        return {t: int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[0]) for t in threads}

    run(v, PARTS, threads=3)
    ran: dict[str, list[int]] = {thread: [] for thread in nanoseconds()}
    for _ in range(20):
        time.sleep(0.02)  # they sleep by now
        before = nanoseconds()
        CPU.wake_helpers()
        time.sleep(0.02)
        for thread, now in nanoseconds().items():
            ran[thread].append(now - before[thread])
    same = all(all(map(torch.equal, run(v, PARTS, threads=3), alone)) for _ in range(3))
    queue.put((same, list(ran.values())))


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="reads how long threads ran as Linux counts it")
def test_helpers_are_woken_ahead_of_work():
    """They wait for it as they do after a kernel, 100 us long, and go back to sleep without any."""
    v = make(203, 24, 300, 40)
    CPU.wake_helpers()
    with kernels(None, 1):
        alone = run(v, PARTS, threads=3)
        fork = multiprocessing.get_context("fork")
        queue = fork.SimpleQueue()
        child = fork.Process(target=_ran_for, args=(queue, v, alone), daemon=True)
        child.start()
        child.join(120)
        assert child.exitcode == 0, "the child hangs, or failed"
        same, ran = queue.get()
    assert same
    assert len(ran) == 2
    # an interruption counts as running, so that a single time says little
    assert min(map(statistics.median, ran)) > 60_000
    assert max(map(max, ran)) < 10_000_000
