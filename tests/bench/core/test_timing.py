"""Interleaved rounds, their number and quantiles, and the peak memory of a call."""

import os

import pytest
import torch
from lcconformer.bench.core.timing import SPIN_SECONDS, Timing, free_memory, peak_memory_mb, time_interleaved


def test_interleaving_turns_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_interleaved(calls, "cpu", seconds=0.0, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert set(found) == set("abc")


def test_calls_apart_come_after_a_pause_and_an_untimed_call(monkeypatch):
    done = []
    monkeypatch.setattr("lcconformer.bench.core.timing.time.sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(
        "lcconformer.bench.core.timing.time_once", lambda call, device: call() or done.append("timed") or 1.0
    )
    time_interleaved({"a": lambda: done.append("a")}, "cpu", seconds=0.0, rounds=2, apart=True)
    assert done == [SPIN_SECONDS, "a", "a", "timed"] * 2


def test_rounds_follow_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lcconformer.bench.core.timing.time.perf_counter", lambda: now[0])

    def call():
        now[0] += 0.125
        count[0] += 1

    for seconds, expected in ((0.0, 5), (1.25, 10), (100.0, 100)):
        count = [0]
        assert time_interleaved({"a": call}, "cpu", seconds)["a"].median == 125.0
        assert count[0] == expected


def test_timing_quantiles():
    assert Timing.of([float(x) for x in range(11)]) == Timing(5.0, 2.0, 8.0)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(250_000)  # 1 MB

    def call():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert peak_memory_mb(call, "cpu") == pytest.approx(2.0, rel=0.05)


def test_free_memory_is_less_than_there_is():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory("cpu") <= pages
