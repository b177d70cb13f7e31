"""Dropout by counters: the key that forward and backward share, and what the kernels are told of a probability."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["drawn_from", "dropout_seed"]


def dropout_seed(x: Tensor, dropout_p: float, shape: tuple[int, ...] = (1,)) -> Tensor | None:
    """Draw the key of the counter-based dropout: int64 of ``shape`` on the device of ``x``; None without dropout.

    It comes from the generator of the device: no synchronisation, a fresh one at every replay of a CUDA graph, and the same
    one again when activation checkpointing recomputes.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, device=x.device)


@contextmanager
def drawn_from(seed: Tensor | None) -> Iterator[None]:
    """Make ``F.dropout`` draw the same masks for the same seed; on a GPU this waits for the seed's value."""
    if seed is None:
        yield
        return
    on_gpu = seed.device.type == "cuda"
    generator = torch.cuda.default_generators[seed.device.index] if on_gpu else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(seed))
    try:
        yield
    finally:
        generator.set_state(state)
