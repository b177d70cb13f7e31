"""What a user attaches to a submodule counts: hooks, adapters, parametrisations, pruning, quantisation, other classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

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


class Lora(nn.Module):
    """A low-rank adapter around a linear map, as PEFT wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    @property
    def weight(self) -> torch.Tensor:  # PEFT's layers show the base's too
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()

    def merged(self) -> nn.Linear:
        out = copy.deepcopy(self.base)
        with torch.no_grad():
            out.weight += self.b @ self.a
        return out


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_hook_changes_the_output_and_runs_once_a_loop(name, grad):
    encoder, calls = make(), []
    plain = run(encoder, grad)

    def double(module, args, output):
        calls.append(1)
        return 2 * output

    handle = encoder.layers[0].get_submodule(name).register_forward_hook(double)
    hooked = run(encoder, grad)
    assert len(calls) == 3
    assert not torch.allclose(hooked, plain)
    handle.remove()
    torch.testing.assert_close(run(encoder, grad), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", READ)
def test_a_hook_that_changes_nothing_changes_nothing(name):
    encoder = make()
    plain = run(encoder)
    encoder.layers[0].get_submodule(name).register_forward_hook(lambda *_: None)
    torch.testing.assert_close(run(encoder), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ffn1.up", "conv.depthwise_norm", "attention.norm"])
def test_pre_hooks_and_backward_hooks_run(name):
    encoder, calls = make(), []
    module = encoder.layers[0].get_submodule(name)
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    run(encoder, grad=True).sum().backward()
    assert calls.count("before") == calls.count("backward") == 3


@pytest.mark.parametrize("name", ["ffn1.up", "ffn2.down"])
def test_an_adapter_counts_and_learns(name):
    encoder = make()
    owner, _, leaf = name.rpartition(".")
    parent = encoder.layers[0].get_submodule(owner)
    adapter = Lora(getattr(parent, leaf))
    setattr(parent, leaf, adapter)
    out = run(encoder, grad=True)
    out.sum().backward()
    assert adapter.a.grad is not None
    assert adapter.a.grad.abs().sum() > 0
    with_adapter = run(encoder)
    setattr(parent, leaf, adapter.merged())
    torch.testing.assert_close(run(encoder), with_adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ffn1.up", "conv.depthwise"])
def test_parametrisations_train(name):
    encoder = make()
    plain = run(encoder)
    module = encoder.layers[0].get_submodule(name)
    parametrizations.weight_norm(module)
    torch.testing.assert_close(run(encoder), plain, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    for _ in range(2):  # the second step met a graph that was freed
        optimizer.zero_grad()
        run(encoder.train(), grad=True).square().mean().backward()
        optimizer.step()
    assert module.parametrizations.weight.original0.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_weight_norm_trains():
    encoder = make()
    plain = run(encoder)
    nn.utils.weight_norm(encoder.layers[0].ffn1.up)
    torch.testing.assert_close(run(encoder), plain, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        run(encoder, grad=True).sum().backward()


def test_pruned_weights_stay_pruned():
    encoder = make()
    module = encoder.layers[0].ffn2.down
    prune.l1_unstructured(module, "weight", amount=0.5)
    pruned = run(encoder)
    for _ in range(2):
        run(encoder, grad=True).sum().backward()
    assert ((module.weight_orig.grad == 0) == (module.weight_mask == 0)).all()
    prune.remove(module, "weight")
    torch.testing.assert_close(run(encoder), pruned, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation():
    if torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch has no quantised kernels")
    encoder = make()
    plain = run(encoder)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(encoder), {nn.Linear}, torch.qint8)
    out = run(quantised)
    assert not torch.equal(out, plain)
    assert (out - plain).square().mean() < 0.01 * plain.square().mean()


class Twice(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["ffn1.norm", "conv.depthwise_norm", "conv.norm"])
def test_a_subclass_is_called(name):
    encoder = make()
    module = encoder.layers[0].get_submodule(name)
    module.register_forward_hook(lambda m, a, out: 2 * out)
    wanted = run(encoder)
    owner, _, leaf = name.rpartition(".")
    twice = Twice(16, eps=module.eps)
    twice.load_state_dict(module.state_dict())
    setattr(encoder.layers[0].get_submodule(owner), leaf, twice)
    torch.testing.assert_close(run(encoder), wanted, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("training", [False, True])
def test_masked_statistics_with_a_changed_convolution(norm, training):
    """A hook on the convolution leaves statistics over real frames alone."""
    encoder = make(conv_norm=norm).train(training)
    other = copy.deepcopy(encoder)
    other.layers[0].conv.depthwise.register_forward_hook(lambda *_: None)
    wanted, found = run(encoder), run(other)
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(found[b, :n], wanted[b, :n], rtol=1e-4, atol=1e-5)
    for (name, a), (_, b) in zip(encoder.named_buffers(), other.named_buffers()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


# norms decide for themselves


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


def test_sync_batch_norm_in_evaluation_is_batch_norm():
    encoder = make(conv_norm="batch")
    plain = run(encoder)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    torch.testing.assert_close(run(converted), plain, rtol=1e-4, atol=1e-5)


def test_conformer_with_a_hook():
    model = Conformer(16, 2, 24, 2, 5).eval()
    plain = model(X, LENGTHS)[0]
    model.encoder.layers[1].conv.depthwise_norm.register_forward_hook(lambda m, a, out: 0 * out)
    assert not torch.allclose(model(X, LENGTHS)[0], plain)
