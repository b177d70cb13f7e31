"""Launches of a Triton kernel over a driver that does nothing, with arguments of every kind.

Run as a script, without TRITON_INTERPRET: launches it by `common.launch` and by Triton itself, compares what was launched, and
prints how many launches and specialisations there were.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
import triton.language as tl
from lcconformer.bench.core.idle_driver import LAUNCHED, TOLD, install
from lcconformer.kernels import common
from lcconformer.kernels.common import LaunchConfig


@triton.jit(do_not_specialize=("m",))
def kernel(x_ptr, y_ptr, seed_ptr, n, m, alpha, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * n, mask=i < m) * alpha
    if seed_ptr is not None:
        x += tl.load(seed_ptr)
    if FLAG:
        tl.store(y_ptr + i, x)


def cases() -> list[tuple[LaunchConfig, tuple[Any, ...], dict[str, Any]]]:
    around = torch.zeros(64)
    tensors = [around, around[1:], around.half()]
    found = []
    for x, seed, n, m in itertools.product(
        tensors, (None, torch.zeros(1, dtype=torch.int64)), (1, 2, 16, 2**31), (1, 16, 5, 2**31)
    ):
        found.append((LaunchConfig(4, 1, {"BLOCK": 16}), (x, around, seed, n, m, 0.5), {"FLAG": True}))
    x = around
    for config in (
        LaunchConfig(2, 1, {"BLOCK": 16}),
        LaunchConfig(4, 2, {"BLOCK": 32}),
        LaunchConfig(4, 1, {"BLOCK": 16}, True),
    ):
        found.append((config, (x, x, None, 2, 3, 0.5), {"FLAG": False}))
    found.append((found[0][0], (x, x, None, 2, 3), {"alpha": 2.5, "FLAG": True}))
    return found


def same() -> dict[str, int]:
    """Launch every case three times by `launch`, the last two of them bound, and once by Triton."""
    kernels = set()
    for config, args, kwargs in cases():
        for grid in ((3,), (3, 2)):
            LAUNCHED.clear()
            TOLD.clear()
            for _ in range(3):
                common.launch(kernel, grid, config, args[0], *args, **kwargs)
            kernel[grid](*args, **kwargs, **config.kwargs())
            assert len(LAUNCHED) == 4
            for launched in LAUNCHED[:3]:
                assert len(launched) == len(LAUNCHED[3])
                assert all(a is b or a == b for a, b in zip(launched, LAUNCHED[3])), (launched, LAUNCHED[3])
            assert TOLD[1:3] == [None, None], "not bound"
            kernels.add(LAUNCHED[0][0])
    return {"cases": len(cases()), "kernels": len(kernels), "bound": len(common._bound)}


if __name__ == "__main__":
    install()
    print(json.dumps(same()))
