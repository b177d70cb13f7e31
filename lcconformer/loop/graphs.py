"""Inference on a GPU: recorded as CUDA graphs, and replayed at the cost of one launch.

For each shape there are static buffers for the input and the lengths, and what runs the loops in them: the chain of kernels
(:mod:`.chain`), all loops as one graph; or, where it cannot serve, the modules: every unique layer has a graph that turns the
residual stream into that of the next loop, in place, so that any depth is a number of replays.  With padding masked, T is
rounded up to a multiple of 64 and the rest is padding.

A shape is recorded when it comes for the second time: a recording costs more than a call, and pays only for shapes that
come often.  Graphs read the encoder's parameters in place, so that updating these in place needs no new recording; graphs
are recorded again when a tensor has moved.  Outputs are copies: the next call writes over the buffers.  Recording
synchronises, a replay does not.  Calls on several streams or threads take turns.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lcconformer.layer import ConformerLayer, Positions
from lcconformer.ops.registry import Choice, forced_backend, note
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from . import chain
from .recording import CudaGraphs, Record, Replay, unrecorded
from .watch import watch

__all__ = ["BUCKET", "SHAPES", "padded_frames", "run"]

BUCKET = 64  # frames
SHAPES = 16  # recorded at a time; the one not used for longest makes room
SEEN = 1024  # shapes that are remembered to have come once


def padded_frames(stack: LayerStack, x: Tensor) -> int:
    """Return the frames that ``x [B, T, d_model]`` is computed with."""
    t = x.shape[1]
    return -(-t // BUCKET) * BUCKET if stack.config.padding == "masked" else t


class _Modules:
    """The modules as graphs: one that projects the positions, then one for each unique layer, replayed loop by loop.

    Args:
        x: static ``[B, T, d_model]``, the residual stream; a loop works in place.
        lengths: static ``[B]``, or None.
        record: what records and replays.
    """

    def __init__(self, stack: LayerStack, x: Tensor, lengths: Tensor | None, record: Record) -> None:
        self.x, self.lengths, self.record = x, lengths, record
        frames, d = x.shape[1:]
        self.positions: dict[int, Positions] = {}
        self.loops: dict[int, Replay] = {}
        layers = {i: cast(ConformerLayer, stack.layers[i]) for i in set(stack.layer_map)}
        if stack.config.position != "relative":
            self.positions = {i: layer.positions(self.x) for i, layer in layers.items()}
            self.start: Replay = lambda: None
            return
        dtype = layers[0].attention.pos.weight.dtype
        table = relative_sinusoids(frames, d, device=x.device, dtype=dtype)
        heads = (stack.config.num_heads, d // stack.config.num_heads)

        def project() -> None:
            self.positions = {i: layer.attention.pos(table).unflatten(-1, heads) for i, layer in layers.items()}

        self.start = record(project)
        self.table = table  # the graph reads it

    def run(self, stack: LayerStack, depth: int, all_states: bool) -> Iterator[Tensor]:
        """Yield the outputs ``[B, T, d_model]`` of loops 0 ... ``depth - 1``, or of the last alone.

        The next loop overwrites them.
        """
        self.start()
        for k in range(depth):
            self._loop(stack, k)
            if all_states or k == depth - 1:
                yield self.x

    def _loop(self, stack: LayerStack, k: int) -> None:
        """Run loop ``k``, recording it on its first run."""
        told_apart = stack.config.conditioning or stack.config.conv_norm_statistics == "per_depth"
        key = k if told_apart else stack.layer_map[k]
        if key not in self.loops:
            before = self.x.clone()
            self.loops[key] = self.record(lambda: self._step(stack, k))
            self.x.copy_(before)
        self.loops[key]()

    def _step(self, stack: LayerStack, k: int) -> None:
        self.x.copy_(stack.step(k, self.x, self.lengths, self.positions))


class _Shape:
    """The static input of one shape, and what runs its loops: the chain of kernels where it serves, else the modules."""

    def __init__(self, stack: LayerStack, x: Tensor, frames: int, masked: bool, record: Record) -> None:
        b, _, d = x.shape
        self.x = x.new_zeros((b, frames, d))
        self.lengths = torch.full((b,), frames, device=x.device) if masked else None
        self.chained = not chain.reasons(stack, x, b * frames)
        kind = chain.Chain if self.chained else _Modules
        self.loops: _Modules | chain.Chain = kind(stack, self.x, self.lengths, record)

    def run(
        self, stack: LayerStack, x: Tensor, lengths: Tensor | None, depth: int, return_hidden_states: bool
    ) -> list[Tensor]:
        frames = x.shape[1]
        self.x[:, :frames].copy_(x)
        self.x[:, frames:].zero_()
        if self.lengths is not None:
            self.lengths.copy_(lengths) if lengths is not None else self.lengths.fill_(frames)
        if self.chained:
            note(Choice("shared_loop", "triton"))
        return [
            state[:, :frames].clone(memory_format=torch.contiguous_format)
            for state in self.loops.run(stack, depth, return_hidden_states)
        ]


class _Graphs:
    """The recorded shapes of one stack."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shapes: OrderedDict[tuple, _Shape] = OrderedDict()
        self.seen: OrderedDict[tuple, None] = OrderedDict()
        self.places: tuple[list, ...] = ()
        self.memory: list = []
        self.done: torch.cuda.Event | None = None

    def shape(self, stack: LayerStack, x: Tensor, lengths: Tensor | None, record: Record | None) -> _Shape:
        """Return the shape of a call: a new one if it is not kept, or if a weight has moved in memory.

        A shape that comes for the first time is not kept, and its loops are not recorded.
        """
        now = watch(stack)
        if now.places() != self.places:
            self._drop(0)
            self.places, self.memory = now.places(), now.memory()
        masked = stack.config.padding == "masked"
        frames = padded_frames(stack, x)
        settings = forced_backend(), torch.get_float32_matmul_precision()
        key = (x.shape[0], frames, x.dtype, x.device, masked or lengths is not None, *settings)
        if key not in self.shapes:
            masked = masked or lengths is not None
            if record is None and key not in self.seen:
                self.seen[key] = None
                if len(self.seen) > SEEN:
                    self.seen.popitem(last=False)
                return _Shape(stack, x, frames, masked, unrecorded)
            self._drop(SHAPES - 1)
            self.shapes[key] = _Shape(stack, x, frames, masked, record or CudaGraphs(x.device))
        self.shapes.move_to_end(key)
        return self.shapes[key]

    def _drop(self, most: int) -> None:
        """Drop all but ``most`` shapes, after waiting for graphs that still run."""
        if self.done is not None and len(self.shapes) > most:
            self.done.synchronize()
        while len(self.shapes) > most:
            self.shapes.popitem(last=False)


_kept: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()


def run(
    stack: LayerStack,
    x: Tensor,
    lengths: Tensor | None,
    depth: int,
    return_hidden_states: bool,
    record: Record | None = None,
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone.

    Args:
        record: what records and replays; None: CUDA graphs, from the second call with a shape on.
    """
    graphs = _kept.setdefault(stack, _Graphs())
    # buffers made in inference mode could not be written outside of it
    with graphs.lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(x):
        if graphs.done is not None:
            torch.cuda.current_stream().wait_event(graphs.done)
        shape = graphs.shape(stack, x, lengths, record)
        outputs = shape.run(stack, x, lengths, depth, return_hidden_states)
        if x.is_cuda:
            graphs.done = graphs.done or torch.cuda.Event()
            graphs.done.record()
    return outputs
