"""Launches of a Triton kernel over a driver that does nothing, with arguments of every kind.

Run as a script, without TRITON_INTERPRET: launches it by `common.launch`, at once and later, and by Triton itself, compares
what was launched, and prints how many launches and specialisations there were.
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


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(a is b or a == b for a, b in zip(one, other))


def same() -> dict[str, int]:
    """Launch every case twice by `launch` and once by Triton."""
    kernels = set()
    for config, args, kwargs in cases():
        for grid in ((3,), (3, 2)):
            LAUNCHED.clear()
            TOLD.clear()
            for _ in range(2):
                common.launch(kernel, grid, config, args[0], *args, **kwargs)
            kernel[grid](*args, **kwargs, **config.kwargs())
            assert len(LAUNCHED) == 3
            for launched in LAUNCHED[:2]:
                assert equal(launched, LAUNCHED[2]), (launched, LAUNCHED[2])
            assert TOLD[:2] == [None, None], "not bound"
            kernels.add(LAUNCHED[0][0])
    return {"cases": len(cases()), "kernels": len(kernels), "bound": len(common._known(kernel).compiled)}


def listen(_metadata: Any) -> None:
    pass


def later() -> None:
    """Collect a launch and make it several times: on the stream of each time, and through Triton where a profiler listens."""
    config, args, kwargs = cases()[0]
    kernel[(3,)](*args, **kwargs, **config.kwargs())
    driver, hook = triton.runtime.driver.active, triton.knobs.runtime.launch_enter_hook
    by_triton = LAUNCHED[-1]
    stream = by_triton[4]
    LAUNCHED.clear()
    TOLD.clear()
    with common.collected() as launches:
        common.launch(kernel, (3,), config, args[0], *args, **kwargs)
    assert len(launches) == 1
    assert not LAUNCHED
    for own in (stream, stream + 1, stream):
        driver.get_current_stream = lambda _device, own=own: own
        common.run(launches, args[0])
    hook.add(listen)
    common.run(launches, args[0])
    hook.remove(listen)
    assert [launched[4] for launched in LAUNCHED] == [stream, stream + 1, stream, stream]
    for launched in LAUNCHED:
        assert equal((*launched[:4], stream, *launched[5:]), by_triton)
    assert TOLD[:3] == [None, None, None], "not bound"
    assert TOLD[3] is not None, "a profiler does not hear of it"


if __name__ == "__main__":
    install()
    found = same()
    later()
    print(json.dumps(found))
