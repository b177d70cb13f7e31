"""Training on a GPU in two launches: forward and backward of all loops recorded as CUDA graphs and replayed.

For each depth and shape there is a pair of graphs on static buffers: the input, the lengths, the dropout seeds, and the
gradients of the outputs.  The seeds are drawn anew before each replay, so that no two steps drop the same elements.  With
padding masked, T is rounded up to a multiple of 64 and the rest is padding.  All pairs share one pool of memory, whose tensors
live from a forward to its backward: the next forward takes the memory of the one before.

To autograd the pair is one function of the input and the parameters: gradients are copies that autograd accumulates itself, so
that ``.grad``, DDP and optimizers work as they do without.  Graphs read the parameters in place and are recorded again when a
tensor has moved.  Recording synchronises and runs the step eagerly once; a replay does neither.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lcconformer.ops.derivatives import differentiable_once
from lcconformer.ops.registry import forced_backend
from lcconformer.packing import Packing, padded
from lcconformer.stack import LayerStack

from . import training
from .graphs import padded_frames
from .kernels import Kernels
from .recording import CudaGraphs
from .watch import watch

__all__ = ["STEPS", "captured_training", "run", "wanted"]

STEPS = 64  # pairs of a depth and a shape that are kept; the one not used for longest makes room

_wanted: ContextVar[bool] = ContextVar("lcconformer.captured_training", default=False)


@contextmanager
def captured_training() -> Iterator[None]:
    """Replay CUDA graphs for every encoder that is trained on a GPU by the loop engine inside the block.

    The first forward at a depth and a shape records forward and backward; later ones launch one graph each.  Pad batches to a
    few lengths, and let :class:`~lcconformer.DepthSampler` draw depths as it likes.  Each forward needs its backward, which
    may lie outside of the block, before the next forward of the same encoder: call ``loss.backward()`` for every batch of an
    accumulated step.  DDP, gradient accumulation, autocast and gradient scalers work as they do without.  On a CPU, in
    evaluation, or where the modules serve, the block changes nothing.  It holds for the thread or asyncio task that enters it.

    Example:
        >>> with lcconformer.captured_training():
        ...     output, _ = encoder(torch.randn(2, 128, 80), torch.tensor([128, 90]), depth=5)
        >>> output.square().mean().backward()
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted(x: Tensor) -> bool:
    """Whether the loops of ``x`` are to be replayed: on a GPU, inside of the block, but not inside of another capture."""
    return _wanted.get() and x.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Step:
    """Forward and backward at one depth and shape, and their static buffers.

    Nothing here holds the stack, beside which steps are kept by weak reference.

    Args:
        stack, x, lengths, seeds: of the call; copied.
        loops: runs the loops of (x, lengths, seeds).
        parameters: that need a gradient.
    """

    def __init__(
        self,
        stack: LayerStack,
        x: Tensor,
        lengths: Tensor | None,
        seeds: Tensor | None,
        loops: Callable[[Tensor, Tensor | None, Tensor | None], list[Tensor]],
        parameters: list[nn.Parameter],
        record: CudaGraphs,
    ) -> None:
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.lengths = None if lengths is None else lengths.clone()
        self.seeds = None if seeds is None else seeds.clone()
        self.outputs: list[Tensor] = []
        self.douts: list[Tensor] = []
        self.gradients: tuple[Tensor | None, ...] = ()
        sources = [*([self.x] if x.requires_grad else []), *parameters]
        # running statistics: only replays count
        statistics = [(b, b.clone()) for b in stack.buffers()]

        def forward() -> None:
            with torch.enable_grad():
                self.outputs = loops(self.x, self.lengths, self.seeds)

        def allocate() -> None:
            self.douts = [torch.zeros_like(out) for out in self.outputs if out.requires_grad]

        def backward() -> None:
            # gives back what the forward kept, which the pool may use again
            outputs = [out for out in self.outputs if out.requires_grad]
            self.gradients = torch.autograd.grad(outputs, sources, self.douts, allow_unused=True)

        def both() -> None:
            forward()
            allocate()
            backward()

        record.warm_up(both)
        self.replay_forward = record.capture(forward)
        allocate()
        self.replay_backward = record.capture(backward)
        self.differentiable = [out.requires_grad for out in self.outputs]
        self.outputs = [out.detach() for out in self.outputs]
        for buffer, before in statistics:
            buffer.copy_(before)


class _Steps:
    """The recorded steps of one stack."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.steps: OrderedDict[tuple, _Step] = OrderedDict()
        self.places: tuple[list, ...] = ()
        self.memory: list = []
        self.record: CudaGraphs | None = None
        self.turn = 0  # a number for each replay: what a backward needs is there right after its forward alone
        self.done: torch.cuda.Event | None = None

    def drop(self, most: int) -> None:
        """Drop all but ``most`` steps, after waiting for graphs that still run."""
        if self.done is not None and len(self.steps) > most:
            self.done.synchronize()
        while len(self.steps) > most:
            self.steps.popitem(last=False)

    def wait(self, x: Tensor) -> None:
        """Let the current stream wait for the latest replay."""
        if self.done is not None:
            torch.cuda.current_stream(x.device).wait_event(self.done)

    def replayed(self, x: Tensor) -> int:
        """Count a replay."""
        self.turn += 1
        if x.is_cuda:
            self.done = self.done or torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(x.device))
        return self.turn


_kept: weakref.WeakKeyDictionary[nn.Module, _Steps] = weakref.WeakKeyDictionary()


def run(
    stack: LayerStack,
    x: Tensor,
    lengths: Tensor | Packing | None,
    depth: int,
    return_hidden_states: bool,
    *,
    backprop_depth: int,
    kernels: Kernels,
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    lengths = padded(lengths)
    steps = _kept.setdefault(stack, _Steps())
    frames = x.shape[1]
    seeds = training.draw_seeds(stack, x, depth)
    padding = padded_frames(stack, x) - frames
    if padding:
        if lengths is None:
            lengths = torch.full((len(x),), frames, device=x.device)
        x = nn.functional.pad(x, (0, 0, 0, padding))
    used = sorted(set(stack.layer_map[:depth]))
    parameters = [p for i in used for p in stack.layers[i].parameters() if p.requires_grad]
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def loops(x: Tensor, lengths: Tensor | None, seeds: Tensor | None) -> list[Tensor]:
        # a cast weight of autocast's cache would outlive the graph that made it
        with torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False):
            return training.run(
                stack,
                x,
                lengths,
                depth,
                return_hidden_states,
                backprop_depth=backprop_depth,
                kernels=kernels,
                seeds=seeds,
            )

    with steps.lock, torch.cuda.device_of(x):
        now = watch(stack)
        if now.places() != steps.places:
            steps.drop(0)
            steps.places, steps.memory = now.places(), now.memory()
        key = (
            (*x.shape, x.dtype, x.device, x.requires_grad, lengths is None, seeds is None),
            (stack.layer_map[:depth], backprop_depth, return_hidden_states, stack.gradient_checkpointing),
            (kernels.names, autocast, forced_backend(), torch.get_float32_matmul_precision()),
            tuple(p.requires_grad for p in stack.layers.parameters()),
            tuple(replace(plan, statistics=()) for plan in training.plans_of(stack, depth)),
        )
        steps.wait(x)
        if key not in steps.steps:
            steps.drop(STEPS - 1)
            if steps.record is None:
                steps.record = CudaGraphs(x.device)
            steps.steps[key] = _Step(stack, x, lengths, seeds, loops, parameters, steps.record)
        steps.steps.move_to_end(key)
        outputs = _ReplayFn.apply(steps, steps.steps[key], lengths, seeds, x, *parameters)
    return [out if out.shape[1] == frames else out[:, :frames] for out in outputs]


class _ReplayFn(torch.autograd.Function):
    """(steps, step, lengths, seeds, x, parameters) -> outputs of the loops."""

    @staticmethod
    def forward(ctx, steps: _Steps, step: _Step, lengths, seeds, x: Tensor, *parameters: Tensor):
        ctx.set_materialize_grads(False)
        for static, given in ((step.x, x), (step.lengths, lengths), (step.seeds, seeds)):
            if static is not None:
                static.copy_(given)
        step.replay_forward()
        outputs = tuple(out.detach().clone() for out in step.outputs)
        ctx.mark_non_differentiable(*(out for out, wanted in zip(outputs, step.differentiable) if not wanted))
        ctx.steps, ctx.step, ctx.turn = steps, step, steps.replayed(x)
        return outputs

    @staticmethod
    @differentiable_once("ConformerEncoder", "Run the forward pass without `lcconformer.captured_training()`")
    def backward(ctx, saved_tensors, *douts):
        steps, step = ctx.steps, ctx.step
        if ctx.turn != steps.turn:
            raise RuntimeError(
                "captured_training: another forward or backward of this encoder has taken the memory that this backward "
                "needs. Call backward() once after each forward, or leave the block"
            )
        steps.wait(step.x)
        for static, given in zip(step.douts, (d for d, wanted in zip(douts, step.differentiable) if wanted)):
            static.zero_() if given is None else static.copy_(given)
        step.replay_backward()
        # copies: the next replay writes over the buffers
        found: list[Any] = [None if g is None else torch.empty_like(g) for g in step.gradients]
        pairs = [(new, g) for new, g in zip(found, step.gradients) if new is not None and g is not None]
        torch._foreach_copy_([new for new, _ in pairs], [g for _, g in pairs])
        steps.replayed(step.x)
        into_x = found.pop(0) if step.x.requires_grad else None
        return None, None, None, None, into_x, *found
