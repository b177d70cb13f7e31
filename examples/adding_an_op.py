"""A new op in the way of the library, small enough to read in a minute: ``python examples/adding_an_op.py``.

``squared_relu(x) = relu(x)^2`` (So et al. 2021, "Primer"), with the parts that every op in ``lcconformer/ops`` has: arguments,
a backend behind a protocol, registration with ``torch.library``, autograd, and a public function that chooses.  In the library
each part is a file of the op's folder; here they follow one another.  Plain PyTorch plays the part of the CPU kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lcconformer.ops.contract import Contract
from lcconformer.ops.registry import Op, backend, record

# --- arguments.py: the one list of arguments, what decides the backend, and what a backend does ------------------------


@dataclass(frozen=True)
class SquaredRelu(Contract):
    x: Tensor


class Traits(NamedTuple):
    device: torch.device
    dtype: torch.dtype


class Backend(Protocol):
    def unsupported(self, traits: Traits, /) -> list[str]: ...

    def forward(self, args: SquaredRelu, /) -> Tensor: ...

    def backward(self, dout: Tensor, args: SquaredRelu, /) -> Tensor: ...


# --- reference.py: plain PyTorch, the oracle of every kernel and the fallback ------------------------------------------


def apply(args: SquaredRelu) -> Tensor:
    return torch.relu(args.x).square()


def backward_of_reference(dout: Tensor, args: SquaredRelu) -> Tensor:
    return 2.0 * torch.relu(args.x) * dout


REFERENCE = SimpleNamespace(unsupported=lambda traits: [], forward=apply, backward=backward_of_reference)

# --- cpu.py, triton.py: kernels, with the reasons against them ---------------------------------------------------------


def unsupported(traits: Traits) -> list[str]:
    return [] if traits.dtype == torch.float32 else [f"dtype {traits.dtype} is not float32"]


KERNELS = SimpleNamespace(
    unsupported=unsupported,
    forward=lambda args: args.x.clamp(min=0.0) ** 2,
    backward=lambda dout, args: args.x.clamp(min=0.0).mul_(2.0).mul_(dout),
)

# --- library.py: backends, schema, fake kernels, autograd --------------------------------------------------------------

BACKENDS: dict[str, Backend] = {"cpu": KERNELS, "torch": REFERENCE}
OP: Op[Traits, Backend] = Op("squared_relu", BACKENDS)

torch.library.define("example::squared_relu_fwd", f"({SquaredRelu.schema()}, *, str backend) -> Tensor")
torch.library.define("example::squared_relu_bwd", f"(Tensor dout, {SquaredRelu.schema()}, *, str backend) -> Tensor")


@torch.library.impl("example::squared_relu_fwd", ("CPU", "CUDA"))
def _fwd(*args: Any, backend: str) -> Tensor:
    return OP.backends[backend].forward(SquaredRelu(*args))


@torch.library.impl("example::squared_relu_bwd", ("CPU", "CUDA"))
def _bwd(dout: Tensor, *args: Any, backend: str) -> Tensor:
    return OP.backends[backend].backward(dout, SquaredRelu(*args))


@torch.library.register_fake("example::squared_relu_fwd")
def _fwd_fake(x: Tensor, *, backend: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("example::squared_relu_bwd")
def _bwd_fake(dout: Tensor, x: Tensor, *, backend: str) -> Tensor:
    return torch.empty_like(x)


class SquaredReluFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return torch.ops.example.squared_relu_fwd(x, backend=backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return torch.ops.example.squared_relu_bwd(dout, *ctx.saved_tensors, backend=ctx.backend), None


# --- __init__.py: the public function: checks, choice, call ------------------------------------------------------------


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x)^2``, shaped like ``x``.

    Raises:
        ValueError: ``x`` is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"squared_relu: x has dtype {x.dtype}; expected a floating dtype")
    chosen = OP.choose(Traits(x.device, x.dtype))
    if chosen == "torch":
        return apply(SquaredRelu(x))
    return SquaredReluFn.apply(x, chosen)


def main() -> None:
    x = torch.linspace(-1.0, 2.0, 7, requires_grad=True)
    for name in ("auto", "torch"):
        with backend(name), record() as served:
            y = squared_relu(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        print(f"{name}: served by {served[OP.name]}, gradient {gradient.tolist()}")
    with record() as served:
        squared_relu(x.double())
    print(f"float64: served by {served[OP.name]}")
    torch.library.opcheck(torch.ops.example.squared_relu_fwd.default, (x.detach(),), {"backend": "cpu"})
    compiled = torch.compile(squared_relu, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), squared_relu(x))
    print("compiled: equal")


if __name__ == "__main__":
    main()
