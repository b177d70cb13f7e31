"""``lcconformer doctor``: print the errors of every op and backend on this machine."""

from __future__ import annotations

import argparse
import sys

import torch

from ..doctor import Finding, Refusal, check
from ..ops.samples import CALLS, Sizes

__all__ = ["add_arguments", "run"]

_LINE = "{:<20} {:<6} {:<7} {:<8} {:<9} {:<12} {:>8} {:>9} {:>8}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="check this device only (default: all of this machine)"
    )
    parser.add_argument("--op", choices=CALLS, action="append", help="check this op only (repeatable; default: all)")
    parser.add_argument(
        "--frames", type=int, default=203, help="frames of the longest utterance (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the errors as they are found; returns 1 if a backend is wrong.

    Raises:
        NotImplementedError: ``--device cuda`` without a GPU that torch can use.
        ValueError: ``--frames`` is not positive.
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
                # printed at once, because compiling for a GPU takes minutes
                print(_LINE.format(*where, *numbers, "ok" if found.passed else "WRONG"), flush=True)
    print("\n".join(["", "Not checked:", *_summary(refusals)] if refusals else []))
    wrong = [f for f in findings if not f.passed]
    for f in wrong:
        print(f"{f.op} by {f.backend} on {f.device} in {f.dtype} is wrong: {f.of}, {f.worst}", file=sys.stderr)
    if not findings:
        print("no backend but plain PyTorch serves this machine: 'lcconformer info' says why", file=sys.stderr)
    return int(bool(wrong))


def _summary(refusals: list[Refusal]) -> list[str]:
    """One line per backend and reason."""
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for r in refusals:
        groups.setdefault((r.backend, r.device, r.reason), []).append(r)
    return [
        f"{which} on {device}: {reason} ({', '.join(dict.fromkeys(r.op for r in group))}; "
        f"{', '.join(dict.fromkeys(r.dtype for r in group))})"
        for (which, device, reason), group in groups.items()
    ]
