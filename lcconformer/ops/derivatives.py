"""Derivatives that no kernel has: second ones, and those of ``torch.func``.  The errors say what has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ON_OPS", "differentiable_once", "no_frames", "refuse_transforms", "transformed"]

ON_OPS = (
    'Run the forward pass inside `with lcconformer.backend("torch")`, or set LCCONFORMER_BACKEND=torch: it has them'
)
"""What to do where an op is refused."""


def transformed() -> bool:
    """Return whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(op: str) -> None:
    """Raise NotImplementedError where :func:`transformed`; a compiler handles transforms itself."""
    if not torch.compiler.is_compiling() and transformed():
        raise NotImplementedError(
            f"{op}: the kernels have no derivatives for the transforms of torch.func (vmap, grad, jvp, ...). {ON_OPS}"
        )


class _Refuse(torch.autograd.Function):
    """``(gradient, message, sources) -> gradient`` whose own backward, towards any of the sources, raises."""

    @staticmethod
    def forward(ctx, gradient: Tensor, message: str, *_sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(ctx.message)


def differentiable_once(name: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``backward(ctx, saved_tensors, *douts)`` of an ``autograd.Function``: its gradients have none of their own.

    The list of saved tensors is the backward's own, to be emptied as it goes.

    Unlike with ``torch.autograd.function.once_differentiable`` the error gives advice, and comes also where the incoming
    gradients are constants, and where the gradients of the gradients are asked for inputs by name: there the engine would
    never get to PyTorch's node that raises, and ``allow_unused=True`` would make zeros of them.

    Args:
        name: whose gradients they are.
        instead: the sentence that ends the message: what to do.
    """
    message = f"{name}: the kernels have no second derivatives. {instead}"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *douts: Any) -> Any:
            saved = list(ctx.saved_tensors)  # once: checkpointing hands them out no second time
            if not torch.is_grad_enabled():
                return backward(ctx, saved, *douts)
            twice = not torch.compiler.is_compiling()
            sources = [t for t in (*saved, *douts) if t is not None and t.requires_grad] if twice else []
            with torch.no_grad():
                gradients = backward(ctx, saved, *douts)
            if not twice:
                return gradients
            return tuple(None if g is None else _Refuse.apply(g, message, *sources) for g in gradients)

        return once

    return decorate


def no_frames(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return ``out``, which has no elements, as a result of all inputs: each gets its gradient of zeros."""
    for x in inputs:
        if x is not None:
            out = out + 0.0 * x.sum()
    return out.clone()
