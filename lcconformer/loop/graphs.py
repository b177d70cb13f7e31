"""Inference on a GPU: one loop recorded as a CUDA graph and replayed for each loop, at the cost of one launch.

For each shape there are static buffers: the residual stream, the lengths, projected positions.  The first graph projects the
positions; then every unique layer has a graph that turns the residual stream into that of the next loop, in place, so that
any depth is a number of replays.  (The layer's output is copied back into the static buffer: one more kernel a loop,
which ping-pong buffers could not spare, because the memory of a graph's output is the allocator's choice.)  With padding
masked, T is rounded up to a multiple of 64 and the rest is padding.

Graphs read the encoder's parameters in place, so that updating these in place needs no new recording; graphs are recorded
again when a tensor has moved.  Outputs are copies: the next call writes over the buffers.  Recording synchronises, a
replay does not.  Calls on several streams or threads take turns.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lcconformer.layer import ConformerLayer, Positions
from lcconformer.ops.registry import forced_backend
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from .watch import watch

__all__ = ["BUCKET", "SHAPES", "Record", "run"]

BUCKET = 64  # frames
SHAPES = 16  # recorded at a time; the one not used for longest makes room

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]  # runs a function at least once and returns what replays it


class CudaGraphs:
    """Records functions as CUDA graphs in one pool of memory: no graph relies on what another left there."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Replay:
        # a warm-up: the first run compiles, tunes and allocates
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            call()
        return graph.replay


class _Shape:
    """The static buffers of one shape, and the graphs that work in them."""

    def __init__(self, stack: LayerStack, x: Tensor, frames: int, masked: bool, record: Record) -> None:
        b, _, d = x.shape
        self.x = x.new_zeros((b, frames, d))
        self.lengths = torch.full((b,), frames, device=x.device) if masked else None
        self.record = record
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

    def loop(self, stack: LayerStack, k: int) -> None:
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


class _Graphs:
    """The recorded shapes of one stack."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shapes: OrderedDict[tuple, _Shape] = OrderedDict()
        self.places: tuple[list, ...] = ()
        self.memory: list = []
        self.done: torch.cuda.Event | None = None

    def shape(self, stack: LayerStack, x: Tensor, lengths: Tensor | None, record: Record | None) -> _Shape:
        """Return the shape of a call, recorded if it is new or if a weight has moved in memory."""
        now = watch(stack)
        if now.places() != self.places:
            self._drop(0)
            self.places, self.memory = now.places(), now.memory()
        masked = stack.config.padding == "masked"
        frames = -(-x.shape[1] // BUCKET) * BUCKET if masked else x.shape[1]
        settings = forced_backend(), torch.get_float32_matmul_precision()
        key = (x.shape[0], frames, x.dtype, x.device, masked or lengths is not None, *settings)
        if key not in self.shapes:
            self._drop(SHAPES - 1)
            record = record or CudaGraphs(x.device)
            self.shapes[key] = _Shape(stack, x, frames, masked or lengths is not None, record)
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
        record: what records and replays; None: CUDA graphs.
    """
    graphs = _kept.setdefault(stack, _Graphs())
    # buffers made in inference mode could not be written outside of it
    with graphs.lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(x):
        if graphs.done is not None:
            torch.cuda.current_stream().wait_event(graphs.done)
        shape = graphs.shape(stack, x, lengths, record)
        frames = x.shape[1]
        shape.x[:, :frames].copy_(x)
        shape.x[:, frames:].zero_()
        if shape.lengths is not None:
            shape.lengths.copy_(lengths) if lengths is not None else shape.lengths.fill_(frames)
        shape.start()
        outputs = []
        for k in range(depth):
            shape.loop(stack, k)
            if return_hidden_states or k == depth - 1:
                outputs.append(shape.x[:, :frames].clone(memory_format=torch.contiguous_format))
        if x.is_cuda:
            graphs.done = graphs.done or torch.cuda.Event()
            graphs.done.record()
    return outputs
