"""The way to a kernel past the dispatcher: only where nobody would see the operator, and with the same results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lcconformer import extension, ops
from lcconformer.ops.dispatch import undispatched

taken: Callable[..., str] = undispatched(lambda *args: "operator", lambda *args: "kernel")


class Subclass(Tensor):
    pass


def test_plain_arguments_go_to_the_kernel():
    assert taken(torch.ones(2), nn.Parameter(torch.ones(2)), None, 1, 0.5, True, "silu") == "kernel"


@pytest.mark.parametrize(
    "context",
    [TorchDispatchMode, TorchFunctionMode, FakeTensorMode, torch.autograd.profiler.profile],
    ids=lambda context: context.__name__,
)
def test_what_watches_sees_the_operator(context):
    with context():
        assert taken(None) == "operator"
    assert taken(None) == "kernel"


def test_other_tensors_go_to_the_operator():
    fake = FakeTensorMode().from_tensor(torch.ones(2))
    for x in (torch.ones(2).as_subclass(Subclass), fake):
        assert taken(torch.ones(2), x) == "operator"


def test_transforms_and_tracers_see_the_operator():
    found: list[str] = []

    def function(x: Tensor) -> Tensor:
        found.append(taken(x))
        return x + 1

    torch.func.vmap(function)(torch.ones(2, 3))
    torch.func.grad(lambda x: function(x).sum())(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert found == ["operator"] * 3


@pytest.mark.skipif(extension.why_missing() is not None, reason="the CPU kernels are not here")
def test_profiles_name_forward_and_backward_with_the_same_bits():
    tensors = [
        torch.randn(shape, requires_grad=True) for shape in ((1, 5, 8), (8,), (8,), (12, 8), (12,), (8, 12), (8,))
    ]
    found = []
    for watching in (False, True):
        with torch.autograd.profiler.profile() if watching else nullcontext() as profile:
            y = ops.feed_forward(*tensors)
            found.append((y, *torch.autograd.grad(y.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    names = {event.name for event in profile.function_events}
    assert {"lcconformer::feed_forward_fwd", "lcconformer::feed_forward_bwd"} <= names
