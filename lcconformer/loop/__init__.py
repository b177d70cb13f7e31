"""The engines of the shared loop: all loops of an encoder as one computation instead of module by module.

``modules``: the layer's modules, loop by loop (:mod:`.modules`).  ``loop``: :mod:`.training` where autograd records, or a
module drops elements or takes statistics, else :mod:`.inference`.  ``cluster``: :mod:`.cluster`, on request only.  ``auto``
takes an engine where it can serve and is known to be no slower; a forced engine that cannot serve raises with its reasons.
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

from lcconformer.depth import ExitRule
from lcconformer.ops.derivatives import transformed
from lcconformer.ops.registry import Choice, forced_backend, strict
from lcconformer.packing import Packing
from lcconformer.stack import LayerStack

from . import captured, cluster, inference, modules, training, watch
from .captured import captured_training
from .kernels import explain_ops

__all__ = [
    "ENGINES",
    "Decision",
    "Explanation",
    "adaptive",
    "captured_training",
    "choose",
    "decide",
    "engine",
    "explain",
    "forced_engine",
]

ENGINES = ("modules", "loop", "cluster")
_log = logging.getLogger("lcconformer")
_said: set[str] = set()
_forced: ContextVar[str] = ContextVar("lcconformer.engine", default="")

# (stack, x [B, T, d_model], lengths, depth, return_hidden_states) -> output of each loop if they are wanted, else of the last
Run = Callable[[LayerStack, Tensor, Tensor | Packing | None, int, bool], list[Tensor]]


def _valid(name: str, where: str) -> str:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{where}: unknown engine {name!r}; use one of auto, {', '.join(ENGINES)}")
    return name


def forced_engine() -> str:
    """Return the engine that ``with engine(...)`` or ``LCCONFORMER_ENGINE`` asks for; ``"auto"`` if none."""
    return _forced.get() or _valid(os.environ.get("LCCONFORMER_ENGINE", "auto"), "LCCONFORMER_ENGINE")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run every encoder inside the block module by module (``modules``), on an engine of the loop (``loop``), on the
    cluster-resident loop of sm_90 (``cluster``, at most 16 frames), or as is best (``auto``).  The block holds for the thread
    (or asyncio task) that enters it.

    Raises:
        ValueError: unknown name.  An encoder that the engine cannot serve raises NotImplementedError with the reasons.
    """
    token = _forced.set(_valid(name, "engine"))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Decision:
    """What will run the loops of one call.

    Attributes:
        engine: ``"modules"``, ``"training"``, ``"inference"`` or ``"cluster"``; None: the forced engine cannot serve.
        run: runs them; None with ``engine``.
        against: why no engine of the loop serves; empty if one does.
        lost: the modules serve in the place of a faster engine because of something that the user can change.
    """

    engine: str | None
    run: Run | None
    against: tuple[str, ...] = ()
    lost: bool = False


def choose(stack: LayerStack, x: Tensor, backprop_depth: int, *, packed: bool = False) -> Run:
    """Return what will run the loops of ``x [B, T, d_model]``.

    Args:
        backprop_depth: loops, the last ones, that gradients flow through.
        packed: x is a packed batch, ``[1, total, d_model]``.

    Raises:
        NotImplementedError: an engine was forced and cannot serve, or ``LCCONFORMER_STRICT=1`` and an engine is lost.
    """
    if torch.compiler.is_compiling():
        return functools.partial(modules.run, backprop_depth=backprop_depth)
    decision = decide(stack, x, backprop_depth, packed=packed)
    if decision.run is None:
        raise _cannot_serve(decision.against)
    if decision.lost:
        _lost(decision.against)
    return decision.run


def _cannot_serve(reasons: tuple[str, ...]) -> NotImplementedError:
    return NotImplementedError(
        f"ConformerEncoder: engine {forced_engine()!r} was forced but cannot serve these inputs: {'; '.join(reasons)}. "
        "Change the inputs or the encoder, or let LCCONFORMER_ENGINE=auto choose"
    )


def adaptive(
    stack: LayerStack, x: Tensor, lengths: Tensor | None, rule: ExitRule, depth: int
) -> tuple[Tensor, Tensor] | None:
    """Run each utterance of ``x [B, T, d_model]`` until ``rule`` stops it, where an engine that does so is forced.

    Args:
        depth: loops at most.

    Returns:
        ``(output [B, T, d_model], exit_depths [B] int64)``, or None: it is left to the modules.

    Raises:
        NotImplementedError: the engine cannot serve.
    """
    if forced_engine() != "cluster":
        return None
    against = _against_cluster(stack, x, packed=False)
    if rule.kind == "cosine":
        against += ("the cosine distance is left to the modules",)
    if against:
        raise _cannot_serve(against)
    return cluster.adaptive(stack, x, lengths, rule, depth)


def _against_cluster(stack: LayerStack, x: Tensor, packed: bool) -> tuple[str, ...]:
    return (*_chosen(x), *cluster.reasons(stack, x, records=_records(stack, x), packed=packed))


def decide(
    stack: LayerStack, x: Tensor, backprop_depth: int, *, packed: bool = False, explaining: bool = False
) -> Decision:
    """Decide what runs the loops of ``x [B, T, d_model]`` in the present grad mode.

    Args:
        backprop_depth: loops, the last ones, that gradients flow through.
        packed: x is a packed batch, ``[1, total, d_model]``.
        explaining: leave no trace: ops neither log nor record what they would choose.
    """
    by_modules = functools.partial(modules.run, backprop_depth=backprop_depth)
    want = forced_engine()
    if want == "modules":
        return Decision("modules", by_modules, ("engine 'modules' is forced",))
    if want == "cluster":
        against = _against_cluster(stack, x, packed)
        return Decision(None, None, against) if against else Decision("cluster", cluster.run)
    chosen, kernels, records = _chosen(x), None, _records(stack, x)
    layers = watch.watch(stack)
    # without gradients too: a pass to be recomputed with them (torch.utils.checkpoint, reentrant) draws the same dropout
    if records or layers.trains():
        chosen += training.chosen(stack, x)
        kernels, changeable = training.kernels_or_reasons(stack, x, explaining)
        slower = training.slower(x, kernels)
    else:
        chosen += inference.chosen(stack, x, packed)
        changeable = inference.reasons(layers, x)
        slower = inference.slower(stack, x)
    against = (*chosen, *changeable, *(slower if want == "auto" else ()))
    if against:
        if want == "loop":
            return Decision(None, None, against)
        lost = bool(changeable) and not chosen and not slower and forced_backend() == "auto"
        return Decision("modules", by_modules, against, lost)
    if kernels is not None:
        # a graph has one shape, a packed batch any number of frames
        train = captured.run if records and captured.wanted(x) and not packed else training.run
        recorded = backprop_depth if records else 0
        return Decision("training", functools.partial(train, backprop_depth=recorded, kernels=kernels))
    return Decision("inference", inference.run)


def _lost(reasons: tuple[str, ...]) -> None:
    said = f"ConformerEncoder runs module by module, which is slower ({'; '.join(reasons)})"
    if strict():
        raise NotImplementedError(f"{said}, and LCCONFORMER_STRICT=1 makes the loss of the faster engine an error")
    if said not in _said:
        _said.add(said)
        _log.warning(said)


def _records(stack: LayerStack, x: Tensor) -> bool:
    """Whether autograd is to record the loops."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in stack.parameters()))


def _chosen(x: Tensor) -> list[str]:
    """Return states of the call that rule out every engine, and that the user chose for their own sake."""
    reasons = []
    if torch.jit.is_tracing():
        reasons.append("a compiler is tracing the encoder")
    if transformed() or forward_ad._current_level >= 0:
        reasons.append("a transform of torch.func or forward-mode differentiation is active")
    if type(x) not in (Tensor, nn.Parameter):
        reasons.append(f"the input is a {type(x).__name__}, not a plain tensor")
    return reasons


# --- explanation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What would serve a call of an encoder, and why nothing faster (:meth:`lcconformer.ConformerEncoder.explain`).

    Attributes:
        engine: ``"modules"``, ``"training"``, ``"inference"`` or ``"cluster"``; None: a forced engine cannot serve, and the
            call raises.
        against: why no engine of the loop serves; empty if one does.
        ops: the choice of backend of each op.  The inference engine has one for all, ``shared_loop``: ``"cpu"``, ``"triton"``,
            or ``"modules"``, whose ops follow; so has the cluster-resident loop: ``"cuda"``.
    """

    engine: str | None
    against: tuple[str, ...]
    ops: dict[str, Choice]

    def __str__(self) -> str:
        names = {
            "modules": "module by module",
            "training": "by the training engine",
            "inference": "by the inference engine",
            "cluster": "in a cluster of blocks, in one launch",
            None: "by nothing: the call raises",
        }
        lines = [f"loops run {names[self.engine]}"]
        lines += [f"  no engine of the loop: {reason}" for reason in self.against]
        width = max(map(len, self.ops), default=0)
        for name, choice in self.ops.items():
            lines.append(f"{name:<{width}}  {choice.backend or f'none: {choice.error}'}")
            lines += [f"  not {other}: {'; '.join(reasons)}" for other, reasons in choice.passed_over]
        return "\n".join(lines)


def explain(stack: LayerStack, x: Tensor, *, packed: bool = False) -> Explanation:
    """Work out what would run the loops of ``x [B, T, d_model]`` in the present grad mode, without running or logging.

    Args:
        packed: x is a packed batch, ``[1, total, d_model]``.
    """
    decision = decide(stack, x, len(stack.layer_map), packed=packed, explaining=True)
    if decision.engine == "cluster":
        ops = {cluster.OP: Choice(cluster.OP, "cuda")}
    else:
        ops = inference.explain(stack, x) if decision.engine == "inference" else explain_ops(stack, x)
    return Explanation(decision.engine, decision.against, ops)
