"""What a call would launch on a GPU, recorded without one: every Triton kernel with its arguments, every ATen kernel.

Tensors are on the "meta" device: they have shapes and dtypes and no memory, and nothing is computed.  While recording they say
that they are on "cuda", so that code takes the ways that it takes there.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Aten", "Event", "Triton", "backward", "record"]


@dataclass(frozen=True)
class Triton:
    """One launch of a Triton kernel: arguments by name, absent tensors None."""

    kernel: Any
    grid: tuple[int, ...]
    launch: Any
    arguments: Mapping[str, Any]

    @property
    def bytes(self) -> float:
        """Of all its tensors, once."""
        return float(sum(size_of(v) for v in self.arguments.values() if isinstance(v, Tensor)))


@dataclass(frozen=True)
class Aten:
    """One operator of PyTorch that launches a kernel.

    Attributes:
        name: ``mm``, ``add_``, ...
        product: (batch, M, N, K) of a matrix product, else None.
        bytes: of its inputs and outputs, once.
    """

    name: str
    product: tuple[int, int, int, int] | None
    bytes: float


Event = Triton | Aten

# operators that launch nothing: views, and allocation without a value
_SILENT = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def size_of(x: Tensor) -> int:
    """Return the bytes of the elements that are in memory: expanded dimensions count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride else 1
    return elements * x.element_size()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lcconformer":
            # the kernel itself in place of the shape function of meta tensors
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = {n: v for n, v in kwargs.items() if n != "out"}  # which is the output
        tensors = [t for t in tree_leaves((args, given, out)) if isinstance(t, Tensor)]
        if tensors and not func.is_view and name not in _SILENT:
            # an output that is an input was written as well as read
            self.events.append(Aten(name, _product(name, args), float(sum(map(size_of, tensors)))))
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], config: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Stand in for ``kernels.common.launch``."""
        from lcconformer.kernels.common import issue

        if 0 not in grid:
            named = dict(zip(kernel.arg_names, args)) | kwargs | dict(config.blocks)
            event = Triton(kernel, tuple(grid), config, named)
            issue(lambda _stream, _hooked: self.events.append(event), x)


class _Disguise(TorchFunctionMode):
    """Meta tensors say that they are on a GPU, and what is asked to be on a GPU is meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            of = getattr(func, "__self__", None)
            if of is Tensor.is_cuda:
                return True
            if of is Tensor.device:
                return torch.device("cuda", 0)
        kwargs = {k: _real(v) for k, v in (kwargs or {}).items()}
        return func(*map(_real, args), **kwargs)


def _real(value: Any) -> Any:
    on_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("meta") if on_gpu else value


def _product(name: str, args: tuple[Any, ...]) -> tuple[int, int, int, int] | None:
    if name not in _PRODUCTS:
        return None
    a, b = [v for v in args if isinstance(v, Tensor)][-2:]
    return (1 if a.dim() == 2 else a.shape[0], a.shape[-2], b.shape[-1], a.shape[-1])


@contextlib.contextmanager
def _as_on_a_gpu(recorder: _Recorder, arch: int) -> Iterator[None]:
    from lcconformer.kernels import common, report

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch("torch.cuda.get_device_capability", return_value=divmod(arch, 10)))
        for name in ("current_stream", "device_of", "Event"):
            enter(mock.patch(f"torch.cuda.{name}"))
        enter(mock.patch.object(common, "run", lambda launches, _x: [launch(0, False) for launch in launches]))
        for name in report.kernel_modules():
            module = importlib.import_module(f"lcconformer.kernels.{name}")
            stand_ins = {
                "launch": recorder.launched,
                "arch_of": lambda _x: arch,
                "tuned": lambda _kernel, _x, heuristic, *_: heuristic,
            }
            for own, replacement in stand_ins.items():
                if hasattr(module, own):
                    enter(mock.patch.object(module, own, replacement))
        yield


def record(call: Callable[[], Any], arch: int = 90) -> list[Event]:
    """Return what a call on meta tensors launches when it is made for the second time, in order."""
    recorder = _Recorder()
    with _as_on_a_gpu(recorder, arch), recorder, _Disguise():
        call()
        recorder.events.clear()
        call()
    return recorder.events


def backward(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Run the backward of ``out`` inside of a recorded call.

    :func:`torch.autograd.grad` would leave the disguise off, as PyTorch does while it serves an overridden function.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (out,), (torch.empty_like(out),), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
