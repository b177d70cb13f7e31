"""Which backend serves an op, and why not the others.

Backends, best first: ``cuda`` (csrc/cuda), ``triton`` (kernels/), ``cpu`` (csrc/cpu), ``torch`` (the reference).
``auto`` takes the first that can serve and logs a fallback once; a forced backend raises with its reasons instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["BACKENDS", "backend", "candidates_of", "forced_backend", "select", "strict"]

BACKENDS = ("cuda", "triton", "cpu", "torch")
_ON_DEVICE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
_log = logging.getLogger("lcconformer")
_override: list[str] = []  # innermost ``with backend(...)`` last
_said: set[tuple[str, str]] = set()

_asking: list[bool] = []  # non-empty inside candidates_of

Reasons = Callable[[], list[str]]  # why a backend cannot serve these inputs; empty = it can


class _Asked(BaseException):
    """Carries the candidates out of an op that was asked for no more than them."""

    def __init__(self, candidates: Mapping[str, Reasons]) -> None:
        self.candidates = candidates


def _valid(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; use one of auto, {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str:
    """The backend asked for by ``with backend(...)`` or ``LCCONFORMER_BACKEND``; ``"auto"`` if none."""
    if _override:
        return _override[-1]
    return _valid(os.environ.get("LCCONFORMER_BACKEND", "auto"), "LCCONFORMER_BACKEND")


def strict() -> bool:
    """Whether ``LCCONFORMER_STRICT=1`` makes a fallback an error (benchmarks and GPU tests run so)."""
    return os.environ.get("LCCONFORMER_STRICT", "0") == "1"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend (``auto``, ``cuda``, ``triton``, ``cpu``, ``torch``).

    Raises:
        ValueError: unknown name.  An op that the backend cannot serve raises NotImplementedError with the reasons.
    """
    _override.append(_valid(name, "backend"))
    try:
        yield
    finally:
        _override.pop()


def candidates_of(call: Callable[[], object]) -> Mapping[str, Reasons]:
    """What the one op that ``call`` runs would choose from; the op stops there and computes nothing."""
    _asking.append(True)
    try:
        call()
    except _Asked as asked:
        return asked.candidates
    finally:
        _asking.pop()
    return {}


def select(op: str, device_type: str, candidates: Mapping[str, Reasons]) -> str:
    """Name of the backend that will run ``op``.

    Args:
        op: name of the op, for messages.
        device_type: ``"cuda"``, ``"cpu"``, ... of the inputs.
        candidates: backend name -> function returning the reasons against it for these inputs.  ``torch`` is implied.

    Raises:
        NotImplementedError: a forced backend cannot serve, or ``LCCONFORMER_STRICT=1`` and a fallback would be taken.
    """
    if _asking:
        raise _Asked(candidates)
    want = forced_backend()
    if want == "torch":
        return "torch"
    if want != "auto":
        reasons = candidates[want]() if want in candidates else [f"{op} has no {want} kernel"]
        if reasons:
            raise NotImplementedError(
                f"{op}: backend {want!r} was forced but cannot serve these inputs: {'; '.join(reasons)}. "
                "Change the inputs, or let LCCONFORMER_BACKEND=auto choose"
            )
        return want
    passed_over: list[str] = []
    for name in _ON_DEVICE.get(device_type, ("torch",)):
        if name == "torch":
            break
        if name not in candidates:
            continue
        reasons = candidates[name]()
        if not reasons:
            break
        passed_over.append(f"{name}: {'; '.join(reasons)}")
    else:
        name = "torch"
    if passed_over:
        said = f"{op} falls back to {name} ({' | '.join(passed_over)})"
        if strict():
            raise NotImplementedError(f"{said}, and LCCONFORMER_STRICT=1 makes a fallback an error")
        if (op, said) not in _said and not torch.compiler.is_compiling():
            _said.add((op, said))
            _log.warning(said)
    return name
