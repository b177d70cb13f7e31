"""``python -m lcconformer doctor``: every op, forward and backward, by every backend that serves here, against float64.

An error is the largest difference from the reference in float64 on the same inputs, relative to the largest value of the
tensor. A backend passes where it is off by at most twice (gradients: three times) as much as plain PyTorch in the same dtype
at its worst tensor, plus two roundings.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .ops.registry import OPS, backend
from .ops.samples import CALLS, TRAITS, Sizes
from .tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes, relative_error

__all__ = ["Finding", "Refusal", "add_arguments", "check", "run"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BACKENDS = {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}
_LINE = "{:<20} {:<6} {:<7} {:<8} {:<9} {:<12} {:>8} {:>9} {:>8}  {}"
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
    # what lies in the padding is nobody's business
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


def check(op: str, device: str, sizes: Sizes) -> Iterator[Finding | Refusal]:
    """A finding per backend, dtype and direction, or why a backend cannot serve."""
    reference = getattr(importlib.import_module(f"lcconformer.ops.{op}"), f"{op}_reference")
    for dtype in _DTYPES:
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


def _summary(refusals: list[Refusal]) -> list[str]:
    """A line per backend and reason."""
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for r in refusals:
        groups.setdefault((r.backend, r.device, r.reason), []).append(r)
    return [
        f"{which} on {device}: {reason} ({', '.join(dict.fromkeys(r.op for r in group))}; "
        f"{', '.join(dict.fromkeys(r.dtype for r in group))})"
        for (which, device, reason), group in groups.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only there (default: wherever this machine can)")
    parser.add_argument("--op", choices=CALLS, action="append", help="only this one (repeatable; default: all)")
    parser.add_argument("--frames", type=int, default=203, help="of the longest utterance (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The command: 1 if a backend is wrong.

    Raises:
        NotImplementedError: ``--device cuda`` without a GPU that torch can use.
        ValueError: no frames.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("this machine has no GPU that torch can use; leave --device out to check its CPU")
    if args.frames < 1:
        raise ValueError(f"--frames is {args.frames}; expected at least 1")
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    sizes = Sizes(batch=3, frames=args.frames)
    findings: list[Finding] = []
    refusals: list[Refusal] = []
    print(f"Errors relative to the largest value, {sizes.batch} utterances of at most {sizes.frames} frames:")
    print(_LINE.format("op", "device", "backend", "dtype", "of", "worst tensor", "error", "PyTorch's", "allowed", ""))
    for device in devices:
        for op in args.op or CALLS:
            for found in check(op, device, sizes):
                if isinstance(found, Refusal):
                    refusals.append(found)
                    continue
                findings.append(found)
                numbers = (f"{x:.1e}" for x in (found.error, found.pytorch, found.allowed))
                where = (found.op, found.device, found.backend, found.dtype, found.of, found.worst)
                # as it comes: a GPU compiles for minutes
                print(_LINE.format(*where, *numbers, "ok" if found.passed else "WRONG"), flush=True)
    print("\n".join(["", "Not checked:", *_summary(refusals)] if refusals else []))
    wrong = [f for f in findings if not f.passed]
    for f in wrong:
        print(f"{f.op} by {f.backend} on {f.device} in {f.dtype} is wrong: {f.of}, {f.worst}", file=sys.stderr)
    if not findings:
        print("no backend but plain PyTorch serves this machine: python -m lcconformer info says why", file=sys.stderr)
    return int(bool(wrong))
