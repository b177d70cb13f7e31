"""The loops module by module: what every engine equals, and what serves where none of them can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcconformer.blocks import Lengths
from lcconformer.layer import Positions
from lcconformer.ops.registry import backend, forced_backend
from lcconformer.stack import LayerStack

__all__ = ["run"]


def run(
    stack: LayerStack,
    x: Tensor,
    lengths: Lengths,
    depth: int,
    return_hidden_states: bool,
    *,
    backprop_depth: int,
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of all loops if ``return_hidden_states``, else of the last alone."""
    positions: dict[int, Positions] = {}
    outputs = []
    for k in range(depth):
        if k < depth - backprop_depth:
            with torch.no_grad():
                x = stack.step(k, x, lengths, {})
        elif stack.gradient_checkpointing and torch.is_grad_enabled():
            stack.project_positions(k, x, lengths, positions)  # outside of the recomputation
            options: dict[str, Any] = {}
            if not torch.compiler.is_compiling() or next(stack.buffers(), None) is not None:
                options["context_fn"] = partial(_contexts, stack)
            x = checkpoint(stack.step, k, x, lengths, positions, use_reentrant=False, **options)
        else:
            x = stack.step(k, x, lengths, positions)
        if return_hidden_states or k == depth - 1:
            outputs.append(x)
    return outputs


def _contexts(stack: LayerStack) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Recompute(stack)


class _Recompute(AbstractContextManager[None]):
    """Recompute a loop on the backend of its forward, on whatever thread, without updating running statistics again."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack, self._backend = stack, backend(forced_backend())

    def __enter__(self) -> None:
        self._before = [b.clone() for b in self._stack.buffers()]
        self._backend.__enter__()

    def __exit__(self, *error: object) -> None:
        self._backend.__exit__(None, None, None)
        with torch.no_grad():
            for buffer, value in zip(self._stack.buffers(), self._before):
                buffer.copy_(value)
