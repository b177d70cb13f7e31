"""What the tests of all peers share: models with nothing at its initial value, and the comparison with the peer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcconformer.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes


def randomise(module: nn.Module) -> nn.Module:
    """Move every parameter and running statistic away from its initial value: a swapped or forgotten tensor shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(5)
    return module


def check_alike(
    model: nn.Module,
    peer: nn.Module,
    x: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x),
    real: Tensor | None = None,
) -> None:
    """Outputs and gradients as near to the peer's in float64 as the peer's own, and the same state afterwards.

    Args:
        model, peer: of the same mode.
        x: input.
        call: runs a model: ``[B, T, D]``.
        real: frames ``[B, T]`` that count; None: all.
    """
    found: list[tuple[dict[str, Tensor], ...]] = []
    weight: Tensor | None = None
    for m in (copy.deepcopy(peer).double(), peer, model):
        m.zero_grad()
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        y = call(m, leaf)
        real = torch.ones(y.shape[:2], dtype=torch.bool) if real is None else real
        weight = torch.randn(y.shape) * real[..., None] if weight is None else weight
        (y * weight).sum().backward()
        gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        found.append(({"output": y.detach()[real]}, {"input": leaf.grad, **gradients}))
    for kind, factor in ((0, OUTPUT_FACTOR), (1, GRADIENT_FACTOR)):
        exact, low, ours = (values[kind] for values in found)
        assert list(ours) == list(exact)
        # of one scale, for a gradient may be zero: of the queries of a single frame
        scale = max(float(value.abs().max()) for value in exact.values())
        errors = [{n: float((v[n] - exact[n]).abs().max()) / scale for n in exact} for v in (low, ours)]
        allowed = allowed_error(max(errors[0].values()), factor, x.dtype)
        for name, error in errors[1].items():
            assert passes(error, allowed), f"{name} is off by {error:.2e}; at most {allowed:.2e} is allowed"
    assert list(model.state_dict()) == list(peer.state_dict())
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")
