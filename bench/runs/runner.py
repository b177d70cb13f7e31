"""A provider's module on one case, ready for repeated calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..core.case import Case
from ..providers.registry import Provider

__all__ = ["Runner", "as_tuple"]


def as_tuple(out: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs as a tuple, also where there is only one."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


class Runner:
    """Calling it runs what is timed: a forward, and in training also the gradients of input and parameters.

    A call returns ``(outputs, gradients)``, two tuples of tensors; without training the second is empty.

    Args:
        provider: the provider that built the module.
        case: what to run; it determines the input, which is the same for every provider.
        module: the result of :func:`~lcconformer.bench.providers.registry.build`.
    """

    def __init__(self, provider: Provider, case: Case, module: nn.Module) -> None:
        self.provider = provider
        self.case = case
        self.module = module.train(case.backward)
        self.x = case.input()
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.cotangents: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = self._random_like
        self._random: tuple[Tensor, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def _forward(self) -> tuple[Tensor, ...]:
        with self.provider.scope(), self.case.autocast():
            return as_tuple(self.module(self.x))

    def _step(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if not self.case.backward:
            with torch.no_grad():
                return self._forward(), ()
        out = self._forward()
        # the work of loss.backward() without accumulating into .grad
        return out, torch.autograd.grad(out, [self.x, *self.parameters], self.cotangents(out))

    def _random_like(self, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Random gradients of the outputs, made once."""
        if self._random is None:
            generator = torch.Generator().manual_seed(3)
            self._random = tuple(torch.randn(o.shape, generator=generator).to(o) for o in out)
        return self._random

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._result

    def prepare(self) -> None:
        """Warm up, and capture the CUDA graph of a provider that uses one."""
        if self.provider.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._result = self._step()
            self._graph = graph
        for _ in range(2):
            self()

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Evaluation mode inside the block, so that results can be compared; gradients still flow."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(self.case.backward)
