"""A driver for Triton that does nothing: kernels are compiled for sm_90 and launched nowhere, on tensors of the CPU.

What a launch costs the host can be measured so, and what is launched be seen, without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget

__all__ = ["LAUNCHED", "TOLD", "install"]

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


def install() -> None:
    """Make this Triton's driver in this process; kernels must not be interpreted."""
    from triton.runtime import driver

    driver.set_active(Driver())
