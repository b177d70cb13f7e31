"""The backends of each op, and the choice among them for a call.

Backends, best first: ``cuda`` (csrc/cuda), ``triton`` (kernels/), ``cpu`` (csrc/cpu), ``torch`` (plain PyTorch).  ``auto``
takes the first one that can serve and logs a fallback once; a forced backend raises with its reasons instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = [
    "BACKENDS",
    "OPS",
    "Choice",
    "Op",
    "backend",
    "forced_backend",
    "forget_choices",
    "note",
    "record",
    "strict",
    "until_measured",
]

BACKENDS = ("cuda", "triton", "cpu", "torch")
_ON_DEVICE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
_log = logging.getLogger("lcconformer")
_said: set[str] = set()

# --- policy ----------------------------------------------------------------------------------------------------------

_forced: ContextVar[str] = ContextVar("lcconformer.backend", default="")
# Dynamo cannot read a ContextVar: it reads, and guards on, the latest open `with backend(...)` of any thread
_blocks: list[list[str]] = []
_traced = ""


def _valid(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; use one of auto, {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str:
    """Return the backend that ``with backend(...)`` or ``LCCONFORMER_BACKEND`` asks for; ``"auto"`` if none.

    ``torch.jit.trace`` gets ``"torch"`` then: programs of it are made to run where this package is not installed.
    """
    name = _traced if torch.compiler.is_compiling() else _forced.get()
    name = name or _valid(os.environ.get("LCCONFORMER_BACKEND", "auto"), "LCCONFORMER_BACKEND")
    return "torch" if name == "auto" and torch.jit.is_tracing() else name


def strict() -> bool:
    """Whether ``LCCONFORMER_STRICT=1`` makes a fallback an error; benchmarks and GPU tests run so."""
    return os.environ.get("LCCONFORMER_STRICT", "0") == "1"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend (``auto``, ``cuda``, ``triton``, ``cpu``, ``torch``).

    The block holds for the thread (or asyncio task) that enters it.  On a GPU, autograd runs a backward pass in threads of its
    own: a layer that user code wraps in ``torch.utils.checkpoint`` is recomputed there without the block.

    Raises:
        ValueError: unknown name.  An op that the backend cannot serve raises NotImplementedError with the reasons.
    """
    block = [_valid(name, "backend")]
    token = _forced.set(name)
    _blocks.append(block)
    _trace_latest()
    try:
        yield
    finally:
        _forced.reset(token)
        # by identity: blocks of other threads may have begun and ended in between
        _blocks[:] = [b for b in _blocks if b is not block]
        _trace_latest()


def _trace_latest() -> None:
    global _traced
    _traced = _blocks[-1][0] if _blocks else ""


# --- choice ----------------------------------------------------------------------------------------------------------


class Traits(Protocol):
    """Everything of a call that the backends of its op decide by; hashable, so that all calls alike share one choice."""

    @property
    def device(self) -> torch.device: ...

    def __hash__(self) -> int: ...


class Backend(Protocol):
    """What the registry needs of an op's backend; each op has a Protocol with its kernels beside its arguments."""

    def unsupported(self, traits: Any, /) -> list[str]:
        """Return why this backend cannot serve calls with these traits; empty: it can."""


T = TypeVar("T", bound=Traits)
B = TypeVar("B", bound=Backend)


@dataclass(frozen=True)
class Choice:
    """The backend of one op for calls of one kind.

    Attributes:
        op: name of the op.
        backend: name of the backend that serves; None if a forced one, or a strict fallback, is refused.
        passed_over: better backends and the reasons against them.
        error: the refusal.
    """

    op: str
    backend: str | None
    passed_over: tuple[tuple[str, tuple[str, ...]], ...] = ()
    error: str | None = None


class Op(Generic[T, B]):
    """An op and its backends.

    Args:
        name: name of the op in every folder, in messages and in result files.
        backends: name -> implementation; ``"torch"`` serves everything.
        on_request: backends that ``auto`` takes where nothing speaks against it, and else only when they are forced: traits ->
            why ``auto`` does not, or ``""``.
    """

    def __init__(
        self, name: str, backends: Mapping[str, B], on_request: Mapping[str, Callable[[T], str]] | None = None
    ) -> None:
        self.name, self.backends, self.on_request = name, backends, on_request or {}
        self._choices: dict[Hashable, Choice] = {}
        OPS[name] = self

    def choose(self, traits: T) -> str:
        """Return the backend that serves a call; chosen once for all calls alike.

        Raises:
            NotImplementedError: a forced backend cannot serve, or ``LCCONFORMER_STRICT=1`` and a fallback would be taken.
        """
        if torch.compiler.is_compiling():
            choice = self.explain(traits)
        else:
            key = (traits, forced_backend(), strict())
            found = self._choices.get(key)
            if found is None:
                found = self._choices[key] = self.explain(traits)
                _warn(found)
            note(found)
            choice = found
        if choice.backend is None:
            raise NotImplementedError(choice.error)
        return choice.backend

    def explain(self, traits: T) -> Choice:
        """Work out the choice for a call without raising, logging or recording."""
        want = forced_backend()
        if want == "torch":
            return Choice(self.name, "torch")
        if want != "auto":
            reasons = self.reasons(want, traits)
            if not reasons:
                return Choice(self.name, want)
            error = (
                f"{self.name}: backend {want!r} was forced but cannot serve these inputs: {'; '.join(reasons)}. "
                "Change the inputs, or let LCCONFORMER_BACKEND=auto choose"
            )
            return Choice(self.name, None, ((want, tuple(reasons)),), error)
        passed_over: list[tuple[str, tuple[str, ...]]] = []
        chosen = "torch"
        for name in _ON_DEVICE.get(traits.device.type, ("torch",)):
            if name not in self.backends:
                continue
            reasons = self.reasons(name, traits)
            # one that nobody counts on is not missed
            if name in self.on_request and (reasons or self.on_request[name](traits)):
                continue
            if not reasons:
                chosen = name
                break
            passed_over.append((name, tuple(reasons)))
        if passed_over and strict():
            error = f"{_fallback(self.name, chosen, passed_over)}, and LCCONFORMER_STRICT=1 makes a fallback an error"
            return Choice(self.name, None, tuple(passed_over), error)
        return Choice(self.name, chosen, tuple(passed_over))

    def reasons(self, name: str, traits: T) -> list[str]:
        """Return why a backend cannot serve calls with these traits; empty: it can."""
        if name not in self.backends:
            return [f"{self.name} has no {name} kernel"]
        return self.backends[name].unsupported(traits)


OPS: dict[str, Op[Any, Any]] = {}
"""Every op by its name."""


def until_measured(_traits: object) -> str:
    """Say why kernels that no GPU has run serve on request only."""
    return "on request only, until a GPU has measured it"


def _fallback(op: str, chosen: str, passed_over: list[tuple[str, tuple[str, ...]]]) -> str:
    against = " | ".join(f"{name}: {'; '.join(reasons)}" for name, reasons in passed_over)
    return f"{op} falls back to {chosen} ({against})"


def _warn(choice: Choice) -> None:
    if choice.backend is None or not choice.passed_over:
        return
    said = _fallback(choice.op, choice.backend, list(choice.passed_over))
    if said not in _said:
        _said.add(said)
        _log.warning(said)


def forget_choices() -> None:
    """Choose anew from now on, for what no call tells has changed: an extension that was installed or removed."""
    for op in OPS.values():
        op._choices.clear()


# --- record ----------------------------------------------------------------------------------------------------------

_recorded: ContextVar[dict[str, str] | None] = ContextVar("lcconformer.recorded", default=None)


@contextmanager
def record() -> Iterator[dict[str, str]]:
    """Collect which backend served each op inside the block: name of the op -> backend.

    An op that did not run is not in there, so that a benchmark row named after a backend can prove that its kernels ran.
    """
    served: dict[str, str] = {}
    token = _recorded.set(served)
    try:
        yield served
    finally:
        _recorded.reset(token)


def note(choice: Choice) -> None:
    """Tell :func:`record` of a choice made elsewhere: an engine's, which calls no op."""
    served = _recorded.get()
    if served is not None and choice.backend is not None:
        served[choice.op] = choice.backend
