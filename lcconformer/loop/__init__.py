"""The engines of the shared loop: all loops of an encoder as one computation instead of module by module.

``modules``: the layer's modules, loop by loop.  ``loop``: :mod:`.training` where autograd is to record, else
:mod:`.inference`.  ``auto`` takes an engine where it can serve and is known to be no slower; a forced engine that cannot
serve raises with its reasons.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lcconformer.ops.derivatives import transformed

from . import inference, training

if TYPE_CHECKING:
    from lcconformer.encoder import ConformerEncoder

__all__ = ["ENGINES", "choose", "engine", "forced_engine", "reasons_against"]

ENGINES = ("modules", "loop")
_override: list[str] = []  # innermost ``with engine(...)`` last

# (encoder, x [B, T, d_model], lengths, depth, return_hidden_states) -> output of each loop if they are wanted, else of
# the last alone
Run = Callable[["ConformerEncoder", Tensor, Tensor | None, int, bool], list[Tensor]]


def _valid(name: str, where: str) -> str:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{where}: unknown engine {name!r}; use one of auto, {', '.join(ENGINES)}")
    return name


def forced_engine() -> str:
    """The engine asked for by ``with engine(...)`` or ``LCCONFORMER_ENGINE``; ``"auto"`` if none."""
    if _override:
        return _override[-1]
    return _valid(os.environ.get("LCCONFORMER_ENGINE", "auto"), "LCCONFORMER_ENGINE")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run every encoder inside the block module by module (``modules``), on an engine of the loop (``loop``), or as is best
    (``auto``).

    Raises:
        ValueError: unknown name.  An encoder that the engine cannot serve raises NotImplementedError with the reasons.
    """
    _override.append(_valid(name, "engine"))
    try:
        yield
    finally:
        _override.pop()


def choose(encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None, backprop_depth: int) -> Run | None:
    """The engine that will run the loops of ``x [B, T, d_model]``; None: module by module.

    Args:
        backprop_depth: loops, the last ones, that gradients flow through.

    Raises:
        NotImplementedError: ``loop`` was forced and cannot serve.
    """
    want = forced_engine()
    if want == "modules" or (want == "auto" and torch.compiler.is_compiling()):
        return None
    reasons = reasons_against(encoder, x, lengths)
    if not reasons and _records(encoder, x):
        return functools.partial(training.run, backprop_depth=backprop_depth)
    if not reasons:
        return inference.run
    if want == "loop":
        raise NotImplementedError(
            f"ConformerEncoder: engine 'loop' was forced but cannot serve these inputs: {'; '.join(reasons)}. "
            "Change the inputs or the encoder, or let LCCONFORMER_ENGINE=auto choose"
        )
    return None


def reasons_against(encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None) -> list[str]:
    """Why the loops of ``x [B, T, d_model]`` run module by module; empty: they run on an engine."""
    want = forced_engine()
    if want == "modules":
        return ["engine 'modules' is forced"]
    reasons = _reasons(x)
    if _records(encoder, x):
        reasons += training.reasons(encoder, x)
        if want == "auto" and not reasons:
            reasons = training.slower(encoder, x)
    else:
        reasons += inference.reasons(encoder, x, lengths)
        if want == "auto":
            reasons += inference.slower(x)
    return reasons


def _records(encoder: ConformerEncoder, x: Tensor) -> bool:
    """Whether autograd is to record the loops."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in encoder.parameters()))


def _reasons(x: Tensor) -> list[str]:
    """Why no engine can stand in for the modules; empty: one can."""
    reasons = []
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        reasons.append("a compiler is tracing the encoder")
    if transformed() or forward_ad._current_level >= 0:
        reasons.append("a transform of torch.func or forward-mode differentiation is active")
    if type(x) not in (Tensor, nn.Parameter):
        reasons.append(f"the input is a {type(x).__name__}, not a plain tensor")
    return reasons
