"""Records functions on static buffers, to be replayed: as CUDA graphs, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CudaGraphs", "Record", "Replay", "unrecorded"]

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Returns what replays a function; may run the function itself, once or more."""


class CudaGraphs:
    """Records functions as CUDA graphs in one pool of memory: no graph relies on what another left there."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Replay:
        self.warm_up(call)
        return self.capture(call)

    def warm_up(self, call: Callable[[], None]) -> None:
        """Run a function once, because the first run compiles, tunes and allocates."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, call: Callable[[], None]) -> Replay:
        """Record a function, which is called once."""
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            call()
        return graph.replay


def unrecorded(call: Callable[[], None]) -> Replay:
    """Run a function as it is each time."""
    return call
