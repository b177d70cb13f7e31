"""Accuracy of every op, forward and backward, by every backend that serves this machine, against float64.

An error is the largest difference from the reference in float64 on the same inputs, relative to the largest value of the
tensor. A backend passes where it is off by at most twice (gradients: three times) as much as plain PyTorch in the same dtype
at its worst tensor, plus two roundings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .ops.registry import OPS, backend
from .ops.samples import CALLS, TRAITS, Sizes
from .tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes, relative_error

__all__ = ["Finding", "Refusal", "check"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BACKENDS = {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}
_FACTORS = {"output": OUTPUT_FACTOR, "gradients": GRADIENT_FACTOR}


@dataclass(frozen=True)
class Finding:
    """What one backend gave for one op, dtype and direction: the worst tensor, its error, PyTorch's worst, what is allowed."""

    op: str
    device: str
    backend: str
    dtype: str
    of: str
    worst: str
    error: float
    pytorch: float
    allowed: float

    @property
    def passed(self) -> bool:
        return passes(self.error, self.allowed)


def _run(op: str, function: Callable, dtype: torch.dtype, device: str, sizes: Sizes, rounded: torch.dtype):
    """Outputs and gradients by name, of inputs rounded to ``rounded`` and given in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    leaves: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if name in ("w1", "w2", "weight") and len(shape) > 1:
            x /= shape[1] ** 0.5
        leaves[name] = x.to(device, rounded).to(dtype).requires_grad_()
        return leaves[name]

    # padding, and an utterance without frames
    lengths = torch.linspace(sizes.frames, 0, sizes.batch).long().to(device)
    out = CALLS[op](function, tensor, sizes, lengths)
    outputs = out if isinstance(out, tuple) else (out,)
    # values in the padding are undefined
    real = (torch.arange(sizes.frames, device=device) < lengths[:, None]).view(sizes.batch, sizes.frames)
    outputs = tuple(torch.where(real.view(*real.shape, *[1] * (o.dim() - 2)), o, 0.0) for o in outputs)
    cotangents = [torch.randn(o.shape, generator=generator).to(device, rounded).to(dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {
        "output": {f"output {i}": o.detach() for i, o in enumerate(outputs)},
        "gradients": dict(zip(leaves, gradients)),
    }


@dataclass(frozen=True)
class Refusal:
    """Why a backend was not asked."""

    op: str
    device: str
    backend: str
    dtype: str
    reason: str


def _reasons(op: str, dtype: torch.dtype, device: str, sizes: Sizes, which: str) -> list[str]:
    """Return why the backend cannot serve the op."""
    reasons = OPS[op].reasons(which, TRAITS[op](torch.device(device), dtype, sizes))
    if not reasons and which == "triton" and device == "cpu" and dtype == torch.bfloat16:
        reasons = ["the interpreter's bfloat16 is wrong"]
    return reasons


def check(op: str, device: str, sizes: Sizes, dtypes: Sequence[torch.dtype] = _DTYPES) -> Iterator[Finding | Refusal]:
    """A finding per backend, dtype and direction, or why a backend cannot serve."""
    reference = getattr(importlib.import_module(f"lcconformer.ops.{op}"), f"{op}_reference")
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        exact = _run(op, reference, torch.float64, device, sizes, dtype)
        low = _run(op, reference, dtype, device, sizes, dtype)
        for which in _BACKENDS[device]:
            if reasons := _reasons(op, dtype, device, sizes, which):
                yield Refusal(op, device, which, name, "; ".join(reasons))
                continue
            with backend(which):
                found = _run(op, getattr(ops, op), dtype, device, sizes, dtype)
            for of, values in found.items():
                errors = {n: relative_error(v, exact[of][n]) for n, v in values.items()}
                pytorch = max(relative_error(low[of][n], v) for n, v in exact[of].items())
                worst = max(errors, key=errors.__getitem__)
                allowed = allowed_error(pytorch, _FACTORS[of], dtype)
                yield Finding(op, device, which, name, of, worst, errors[worst], pytorch, allowed)
