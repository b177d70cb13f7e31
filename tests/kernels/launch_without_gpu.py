"""Launches of Triton kernels over a driver that does nothing: what is launched, and what it costs the host.

Run as a script, without TRITON_INTERPRET: "same" launches a kernel with arguments of every kind, by `common.launch` and by
Triton itself, and prints how many launches and specialisations there were; "cost" prints microseconds per launch of each.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
import triton
import triton.language as tl
from lcconformer.kernels import common
from lcconformer.kernels.common import LaunchConfig
from triton.backends.compiler import GPUTarget

LAUNCHED: list[tuple[Any, ...]] = []
TOLD: list[Any] = []  # what a profiler could read of each


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def unload_module(self, *_: Any) -> None:
        pass


class Launcher:
    """In place of the driver's: notes what kernel was launched over what grid with what arguments."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata, self.seen = metadata, src.signature

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
        metadata, _enter, _leave, *args = rest
        LAUNCHED.append((id(self), x, y, z, stream, function, packed, *args))
        TOLD.append(metadata)


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


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


def cost() -> dict[str, float]:
    """Median microseconds of a launch with 24 arguments, as the products of the chain have."""
    from lcconformer.kernels import chain_products

    x, w, v = torch.zeros(128, 256).half(), torch.zeros(1024, 256).half(), torch.zeros(1024).half()
    out = torch.zeros(128, 1024).half()
    config = chain_products.norm_product_config(90, x.dtype, 128, 256, False)
    args = (x, None, None, None, v, v, w, 256, 1, v, out, 128, 1024, 256, 16, 1e-5)
    flags = {"EPILOGUE": 1, "ONE_TILE": True, "PRECISION": "ieee", "PDL": False}
    ways = {
        "triton": lambda: chain_products._norm_product_kernel[(128,)](*args, **flags, **config.kwargs()),
        "launch": lambda: common.launch(chain_products._norm_product_kernel, (128,), config, x, *args, **flags),
        "norm_product": lambda: chain_products.norm_product(x, (v, v), w, v, out, 1e-5, epilogue="silu"),
    }
    found = {}
    for name, call in ways.items():
        times = []
        for _ in range(2000):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        LAUNCHED.clear()
        TOLD.clear()
        found[name] = statistics.median(times[100:]) * 1e6
    return found


if __name__ == "__main__":
    from triton.runtime import driver

    driver.set_active(Driver())
    print(json.dumps({"same": same, "cost": cost}[sys.argv[1]]()))
