"""The processes of a run: a single one, or those that torchrun started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Ranks", "join_ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process, the number of processes, and the device of this one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in float64; every rank must call it."""
        if self.world_size == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()


def _device(name: str | None) -> torch.device:
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {name!r} but torch {torch.__version__} sees no CUDA device; use 'cpu'")
        # each process of a node needs a device of its own
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device is cuda:{index} but there are {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
    return device


def join_ranks(device: str | None = None) -> Ranks:
    """Join the processes that torchrun started (NCCL on CUDA, Gloo on CPU); without torchrun, stay alone.

    The first call makes the process group.  It lasts until the process ends, because its rendezvous works only once.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``; None: the CUDA device of this process if there is one, else the CPU.

    Raises:
        ValueError: no such device.
    """
    place = _device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), place)
    return Ranks(0, 1, place)
