"""Where the time of a call goes: its kernels by the profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..core.timing import quiet
from ..reports.table import grid, number

__all__ = ["kernels_of", "table"]


def kernels_of(call: Callable[[], object], device: str, repeats: int = 3) -> list[dict[str, Any]]:
    """Kernels of one call, the longest first: ``{"name", "count", "us"}``, count and microseconds per call.

    On a CPU, which has no kernels, operators and their own time.
    """
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with quiet(), profile(activities=activities) as profiler:
        for _ in range(repeats):
            call()
        if gpu:
            torch.cuda.synchronize()
    found = [
        {
            "name": event.key[:120],
            "count": event.count / repeats,
            "us": (event.self_device_time_total if gpu else event.self_cpu_time_total) / repeats,
        }
        for event in profiler.key_averages()
        if (event.device_type == DeviceType.CUDA) == gpu
    ]
    return sorted(found, key=lambda kernel: -kernel["us"])


def table(kernels: list[dict[str, Any]], most: int = 25) -> str:
    """The kernels in text: the longest ``most``, and the sum of all."""
    total = sum(kernel["us"] for kernel in kernels) or 1.0
    lines = [
        [k["name"][:70], f"{k['count']:g}", number(k["us"]), f"{100 * k['us'] / total:.0f}%"] for k in kernels[:most]
    ]
    lines.append(["all", f"{sum(k['count'] for k in kernels):g}", number(total), "100%"])
    return grid(["kernel", "a call", "us a call", "share"], lines)
