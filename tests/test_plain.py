"""What a user attaches to or changes on a submodule counts in a whole encoder, by modules and by engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lcconformer
from lcconformer import Conformer, ConformerConfig, ConformerEncoder

BASE = dict(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.0)
# submodules whose parameters the fused ops read
READ = [
    "ffn1.norm", "ffn1.up", "ffn1.down", "attention.norm", "conv.norm", "conv.depthwise", "conv.depthwise_norm", "ffn2.up",
    "ffn2.down", "norm",
]  # fmt: skip
X, LENGTHS = torch.randn(2, 9, 16), torch.tensor([9, 5])


def make(**changes) -> ConformerEncoder:
    torch.manual_seed(1)
    encoder = ConformerEncoder(ConformerConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def run(encoder: nn.Module, grad: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return encoder(X, LENGTHS)[0]


def test_a_forward_of_its_own_is_called():
    encoder = make()
    up = encoder.layers[0].ffn1.up
    up.forward = lambda x: torch.zeros(*x.shape[:-1], 24)
    zeroed = run(encoder)
    del up.forward
    with torch.no_grad():
        up.weight.zero_(), up.bias.zero_()
    torch.testing.assert_close(run(encoder), zeroed, rtol=1e-4, atol=1e-5)


def test_global_hooks_run_for_every_submodule():
    encoder, seen = make(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        run(encoder)
    finally:
        handle.remove()
    assert {encoder.layers[0].get_submodule(name) for name in READ} <= seen


def test_a_compiled_encoder_runs_its_hooks():
    """On a module that is read also those that come later; of others Dynamo has its own rule (skip_nnmodule_hook_guards)."""
    torch._dynamo.reset()
    encoder = make()
    compiled, plain = torch.compile(encoder, fullgraph=True, backend="eager"), run(encoder)
    for _ in range(2):
        torch.testing.assert_close(run(compiled), plain, rtol=1e-4, atol=1e-5)
        handle = encoder.layers[0].ffn1.up.register_forward_hook(lambda m, a, out: 0 * out)
        torch.testing.assert_close(run(compiled), run(encoder), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(run(compiled), plain)
        handle.remove()


def test_a_cumulative_average_is_that_of_pytorch():
    encoder = make(conv_norm="batch", num_layers=1).train()
    norm = encoder.layers[0].conv.depthwise_norm
    norm.momentum = 1.0
    run(encoder, grad=True)
    whole = norm.running_mean.clone()
    norm.momentum = None
    norm.reset_running_stats()
    for _ in range(3):
        run(encoder, grad=True)
    torch.testing.assert_close(norm.running_mean, whole, rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 3


def test_conformer_with_a_hook():
    model = Conformer(16, 2, 24, 2, 5).eval()
    plain = model(X, LENGTHS)[0]
    model.encoder.layers[1].conv.depthwise_norm.register_forward_hook(lambda m, a, out: 0 * out)
    assert not torch.allclose(model(X, LENGTHS)[0], plain)


@pytest.mark.parametrize("engine", ["modules", "auto"])
def test_a_frozen_batch_norm_does_not_train(engine):
    encoder = make(conv_norm="batch").train()
    encoder.layers[0].conv.depthwise_norm.eval()
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    with lcconformer.engine(engine):
        frozen = run(encoder, grad=True)
        evaluated = run(encoder.eval())
    torch.testing.assert_close(frozen, evaluated, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(b, before[n]) for n, b in encoder.named_buffers())


@pytest.mark.parametrize("engine", ["modules", "auto"])
def test_a_later_momentum_counts(engine):
    encoder = make(conv_norm="batch", num_layers=1).train()
    norm = encoder.layers[0].conv.depthwise_norm
    with lcconformer.engine(engine):
        norm.momentum = 1.0
        run(encoder, grad=True)
        whole = norm.running_mean.clone()
        norm.momentum = 0.25
        norm.running_mean.zero_()
        run(encoder, grad=True)
    torch.testing.assert_close(norm.running_mean, 0.25 * whole)
