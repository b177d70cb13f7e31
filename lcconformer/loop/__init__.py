"""The engines of the shared loop: all loops of an encoder as one computation instead of module by module.

``modules``: the layer's modules, loop by loop (:mod:`.modules`).  ``loop``: :mod:`.training` where autograd records, else
:mod:`.inference`.  ``auto`` takes an engine where it can serve and is known to be no slower; a forced engine that cannot
serve raises with its reasons.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lcconformer.ops.derivatives import transformed
from lcconformer.ops.registry import Choice, forced_backend, strict
from lcconformer.stack import LayerStack

from . import inference, modules, training
from .kernels import explain_ops

__all__ = ["ENGINES", "Explanation", "choose", "engine", "explain", "forced_engine"]

ENGINES = ("modules", "loop")
_log = logging.getLogger("lcconformer")
_said: set[str] = set()
_forced: ContextVar[str] = ContextVar("lcconformer.engine", default="")

# (stack, x [B, T, d_model], lengths, depth, return_hidden_states) -> output of each loop if they are wanted, else of the last
Run = Callable[[LayerStack, Tensor, Tensor | None, int, bool], list[Tensor]]


def _valid(name: str, where: str) -> str:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{where}: unknown engine {name!r}; use one of auto, {', '.join(ENGINES)}")
    return name


def forced_engine() -> str:
    """Return the engine that ``with engine(...)`` or ``LCCONFORMER_ENGINE`` asks for; ``"auto"`` if none."""
    return _forced.get() or _valid(os.environ.get("LCCONFORMER_ENGINE", "auto"), "LCCONFORMER_ENGINE")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run every encoder inside the block module by module (``modules``), on an engine of the loop (``loop``), or as is best
    (``auto``).  The block holds for the thread (or asyncio task) that enters it.

    Raises:
        ValueError: unknown name.  An encoder that the engine cannot serve raises NotImplementedError with the reasons.
    """
    token = _forced.set(_valid(name, "engine"))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(stack: LayerStack, x: Tensor, lengths: Tensor | None, backprop_depth: int) -> Run:
    """Return what will run the loops of ``x [B, T, d_model]``.

    Args:
        backprop_depth: loops, the last ones, that gradients flow through.

    Raises:
        NotImplementedError: ``loop`` was forced and cannot serve, or ``LCCONFORMER_STRICT=1`` and an engine is lost.
    """
    by_modules = functools.partial(modules.run, backprop_depth=backprop_depth)
    if torch.compiler.is_compiling():
        return by_modules
    want = forced_engine()
    if want == "modules":
        return by_modules
    recording = _records(stack, x)
    kernels, obstacles = _obstacles(stack, x, recording)
    against = obstacles.all() or (_slower(x, recording, kernels) if want == "auto" else [])
    if not against:
        if kernels is not None:
            return functools.partial(training.run, backprop_depth=backprop_depth, kernels=kernels)
        return inference.run
    if want == "loop":
        raise NotImplementedError(
            f"ConformerEncoder: engine 'loop' was forced but cannot serve these inputs: {'; '.join(against)}. "
            "Change the inputs or the encoder, or let LCCONFORMER_ENGINE=auto choose"
        )
    if obstacles.lasting and not obstacles.passing and forced_backend() == "auto":
        _lost(obstacles.lasting)
    return by_modules


def _lost(reasons: list[str]) -> None:
    said = f"ConformerEncoder runs module by module ({'; '.join(reasons)})"
    if strict():
        raise NotImplementedError(f"{said}, and LCCONFORMER_STRICT=1 makes the loss of the faster engine an error")
    if said not in _said:
        _said.add(said)
        _log.warning(said)


@dataclass(frozen=True)
class _Obstacles:
    """Why no engine can stand in for the modules.

    Attributes:
        passing: what a user chose for its own sake, such as a trace, a transform or the architecture.
        lasting: properties of the encoder or its input, worth a warning: changing them gives the engine back.
    """

    passing: list[str]
    lasting: list[str]

    def all(self) -> list[str]:
        return self.passing + self.lasting


def _obstacles(stack: LayerStack, x: Tensor, recording: bool) -> tuple[training.Kernels | None, _Obstacles]:
    """Return the kernels of the training engine, if it is the one, and what keeps the engine from serving."""
    passing = _passing(x)
    if not recording:
        return None, _Obstacles(passing + inference.passing(stack, x), inference.reasons(stack, x))
    if not x.numel():
        passing.append("there are no frames")
    passing += training.architecture(stack)
    kernels, lasting = training.kernels_or_reasons(stack, x)
    return kernels, _Obstacles(passing, lasting)


def _slower(x: Tensor, recording: bool, kernels: training.Kernels | None) -> list[str]:
    """Return why the modules are, or may be, faster than the engine that could serve; empty: they are not."""
    return training.slower(kernels) if recording and kernels is not None else inference.slower(x)


def _records(stack: LayerStack, x: Tensor) -> bool:
    """Whether autograd is to record the loops."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in stack.parameters()))


def _passing(x: Tensor) -> list[str]:
    reasons = []
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        reasons.append("a compiler is tracing the encoder")
    if transformed() or forward_ad._current_level >= 0:
        reasons.append("a transform of torch.func or forward-mode differentiation is active")
    if type(x) not in (Tensor, nn.Parameter):
        reasons.append(f"the input is a {type(x).__name__}, not a plain tensor")
    return reasons


# --- explanation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What would serve a call of an encoder, and why nothing faster.

    Attributes:
        engine: ``"modules"``, ``"training"`` or ``"inference"``; None: a forced engine cannot serve.
        against: why no engine of the loop serves; empty if one does.
        ops: the choice of backend of each op.  The packed inference engine on a CPU calls none of them.
    """

    engine: str | None
    against: tuple[str, ...]
    ops: dict[str, Choice]

    def __str__(self) -> str:
        names = {
            "modules": "module by module",
            "training": "the training engine",
            "inference": "the inference engine",
            None: "nothing: the forced engine cannot serve",
        }
        lines = [f"loops run by {names[self.engine]}" if self.engine != "modules" else "loops run module by module"]
        lines += [f"  no engine of the loop: {reason}" for reason in self.against]
        width = max(map(len, self.ops), default=0)
        for name, choice in self.ops.items():
            lines.append(f"{name:<{width}}  {choice.backend or f'none: {choice.error}'}")
            lines += [f"  not {other}: {'; '.join(reasons)}" for other, reasons in choice.passed_over]
        return "\n".join(lines)


def explain(stack: LayerStack, x: Tensor) -> Explanation:
    """Work out what would run the loops of ``x [B, T, d_model]`` in the present grad mode, without running or logging."""
    recording, want = _records(stack, x), forced_engine()
    against: list[str] = ["engine 'modules' is forced"]
    if want != "modules":
        kernels, obstacles = _obstacles(stack, x, recording)
        against = obstacles.all() or (_slower(x, recording, kernels) if want == "auto" else [])
    engine: str | None = "modules"
    if not against:
        engine = "training" if recording else "inference"
    elif want == "loop":
        engine = None
    return Explanation(engine, tuple(against), explain_ops(stack, x))
