"""The rule of plain.py, and one layer by its modules called against the same layer by the fused ops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lcconformer import ConformerConfig, ConformerEncoder, ConformerLayer, plain
from lcconformer.plain import obstacle

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.0)
NORMS = ["layer", "batch", "group", "none"]
# every submodule whose parameters the ops or the engines read
READ = [
    *(f"{ffn}.{name}" for ffn in ("ffn1", "ffn2") for name in ("norm", "up", "down")),
    *("attention.norm", "attention.qkv", "attention.out", "attention.pos"),
    *("conv.norm", "conv.pointwise1", "conv.depthwise", "conv.depthwise_norm", "conv.pointwise2", "norm"),
]
X, LENGTHS = torch.randn(2, 9, 16), torch.tensor([9, 6])
REAL = (torch.arange(9) < LENGTHS[:, None])[..., None]


def layer_of(**changes):
    layer = ConformerLayer(BASE.replace(**changes))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer.eval()


def called(layer, *names):
    """A copy with a hook that does nothing on these submodules: they are called."""
    layer = copy.deepcopy(layer)
    for name in names:
        layer.get_submodule(name).register_forward_hook(lambda *_: None)
    return layer


def equal(got, want):
    torch.testing.assert_close(got * REAL, want * REAL, rtol=1e-4, atol=1e-5)


def readable(module):
    return plain.readable([plain.PLAIN], module)


class LoRA(nn.Module):
    """A linear map with a low-rank increment, as PEFT wraps one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()

    def merged(self):
        merged = copy.deepcopy(self.base_layer)
        merged.weight.data += self.b.data @ self.a.data
        return merged


def replace(layer, name, new):
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, new)


# --- the rule --------------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    pass


def test_the_rule():
    linear = nn.Linear(3, 3)
    assert readable(linear)
    handles = [
        linear.register_forward_hook(lambda *_: None),
        linear.register_forward_pre_hook(lambda *_: None),
        linear.register_full_backward_hook(lambda *_: None),
        linear.register_full_backward_pre_hook(lambda *_: None),
    ]
    for handle in handles:
        assert obstacle(linear, "up") == "up has hooks, which would not run"
        handle.remove()
    assert readable(linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not readable(linear)
    handle.remove()
    linear.forward = linear.forward
    assert obstacle(linear, "up") == "up has a forward of its own"
    del linear.forward
    assert readable(linear)
    linear.compile(backend="eager")
    assert obstacle(linear, "up") == "up has a forward of its own"
    assert obstacle(Own(3, 3), "up") == "up is a Own"
    assert obstacle(parametrizations.weight_norm(nn.Linear(3, 3)), "up") == "up is a ParametrizedLinear"
    assert "no weight or no bias" in obstacle(nn.LayerNorm(3, bias=False), "norm")
    assert readable(nn.Conv1d(4, 4, 3, padding=1, groups=4))
    for strange in (
        nn.Conv1d(4, 4, 3, groups=4),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Conv1d(4, 4, 1, dilation=2, groups=4),
    ):
        assert "is no depthwise convolution" in obstacle(strange, "depthwise")


def test_state_of_a_batch_norm():
    assert readable(nn.BatchNorm1d(3))
    assert readable(nn.BatchNorm1d(3, momentum=None).eval())
    assert "momentum=None" in obstacle(nn.BatchNorm1d(3, momentum=None), "norm")
    assert "tracks no running statistics" in obstacle(nn.BatchNorm1d(3, track_running_stats=False), "norm")
    assert "no weight" in obstacle(nn.BatchNorm1d(3, affine=False), "norm")
    assert obstacle(nn.SyncBatchNorm(3), "norm") == "norm is a SyncBatchNorm"


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv_norm", NORMS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_called_modules_compute_what_the_ops_do(conv_norm, first, training):
    """Outputs, gradients and running statistics, whatever is called."""
    layer = layer_of(conv_norm=conv_norm, convolution_first=first).train(training)
    names = READ if conv_norm != "group" else [n for n in READ if n != "conv.depthwise_norm"]
    other = called(layer, *names)
    for lengths in (LENGTHS, None):
        mask = REAL if lengths is not None else torch.ones(1)
        for one in (layer, other):
            one.zero_grad()
            (one(X, lengths) * mask).square().sum().backward()
        torch.testing.assert_close(other(X, lengths) * mask, layer(X, lengths) * mask, rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(layer.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", READ)
def test_hooks_run_once_and_count(name):
    layer = layer_of(conv_norm="batch")
    before, calls = layer(X, LENGTHS), []
    module = layer.get_submodule(name)
    first = module.register_forward_pre_hook(lambda m, i: calls.append("pre"))
    second = module.register_forward_hook(lambda m, i, o: calls.append("post") or o * 0.5)
    got = layer(X, LENGTHS)
    assert calls == ["pre", "post"]
    assert (got - before).abs().max() > 1e-3
    first.remove(), second.remove()
    assert torch.equal(layer(X, LENGTHS), before)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the table of positions has no gradient
@pytest.mark.parametrize("name", READ)
def test_backward_hooks_run_once(name):
    layer, calls = layer_of(conv_norm="batch"), []
    module = layer.get_submodule(name)
    module.register_full_backward_hook(lambda *_: calls.append("back"))
    module.register_full_backward_pre_hook(lambda *_: calls.append("pre"))
    layer(X.clone().requires_grad_(), LENGTHS).sum().backward()
    assert sorted(calls) == ["back", "pre"]


MATRICES = [n for n in READ if n.rpartition(".")[2] in ("up", "down", "qkv", "out", "pos", "pointwise1", "pointwise2")]


@pytest.mark.parametrize("changes", [{}, {"position": "rotary", "rotary_input": "hidden"}], ids=str)
def test_adapters_count_and_learn(changes):
    layer = layer_of(**changes)
    names = [n for n in MATRICES if n != "attention.pos" or not changes]
    merged, before = copy.deepcopy(layer), layer(X, LENGTHS)
    for name in names:
        adapter = LoRA(layer.get_submodule(name))
        replace(layer, name, adapter)
        replace(merged, name, adapter.merged())
    got = layer(X, LENGTHS)
    assert (got - before).abs().max() > 0.1
    equal(got, merged(X, LENGTHS))
    (got * REAL).square().sum().backward()
    for name in names:
        adapter = layer.get_submodule(name)
        assert adapter.base_layer.weight.grad is None
        for p in (adapter.a, adapter.b):
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", [n for n in READ if n.rpartition(".")[2] not in ("norm", "depthwise_norm")])
@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "old weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_reparametrised_weights_train(name, how):
    """Three steps, each with the weight of the step; afterwards the layer with that very weight gives the same."""
    layer = layer_of()
    module = layer.get_submodule(name)
    if how == "parametrize":
        parametrize.register_parametrization(module, "weight", Double())
    elif how == "weight_norm":
        parametrizations.weight_norm(module)
    elif how == "prune":
        prune.random_unstructured(module, "weight", 0.5)
    else:
        torch.nn.utils.weight_norm(module)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs.append(layer(X, LENGTHS))
        (outputs[-1] * REAL).square().sum().backward()
        own = [p for n, p in layer.named_parameters() if n.startswith(name) and "bias" not in n]
        assert all(p.grad is not None for p in own)
        assert any(p.grad.abs().max() > 0 for p in own)
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[2])
    got = layer(X, LENGTHS).detach()
    plain = layer_of()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n in plain.state_dict()}, strict=False)
    with torch.no_grad():
        plain.get_submodule(name).weight.copy_(layer.get_submodule(name).weight)
    equal(got, plain(X, LENGTHS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "changes", [{}, {"position": "rotary"}, {"position": "rotary", "rotary_input": "hidden"}], ids=str
)
def test_dynamic_quantisation(changes):
    layer = layer_of(**changes)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.ffn1.up) is not nn.Linear
    with torch.no_grad():
        got, want = quantised(X, LENGTHS), layer(X, LENGTHS)
    assert 0 < ((got - want) * REAL).abs().max() < 0.2


class Shift(nn.Module):
    def forward(self, x):
        return x + 1.0


@pytest.mark.parametrize("name", ["ffn1.norm", "attention.norm", "conv.norm", "conv.depthwise_norm", "norm"])
def test_replaced_norms_are_called(name):
    layer = layer_of()
    replace(layer, name, Shift())
    got = layer(X, LENGTHS)
    plain = layer_of()
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.get_submodule(name).register_forward_hook(lambda m, i, o: i[0] + 1.0)
    equal(got, plain(X, LENGTHS))


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("ffn1.norm", nn.Identity()),
        ("attention.norm", nn.Identity()),
        ("conv.norm", nn.GroupNorm(1, 9)),  # over frames and channels of [B, T = 9, D]
        ("ffn2.norm", nn.GroupNorm(1, 9)),
        ("norm", nn.Identity()),
        ("ffn1", nn.Identity()),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_plain_module_of_another_class_is_called(name, new):
    """Also one whose class is plain elsewhere: its parameters mean something else here."""
    encoder = ConformerEncoder(BASE).eval()
    hooked = copy.deepcopy(encoder)
    replace(encoder.layers[0], name, new)
    hooked.layers[0].get_submodule(name).register_forward_hook(lambda m, i, o: new(i[0]))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert f"layers.0.{name} is a {type(new).__name__}" in encoder.explain(X).against[0]
            equal(encoder(X)[0], hooked(X)[0])


def test_a_plain_norm_of_another_kind_is_taken_for_what_it_is():
    layer = layer_of(conv_norm="layer")
    want = copy.deepcopy(layer)
    want.conv.depthwise_norm.register_forward_hook(lambda m, i, o: i[0])
    layer.conv.depthwise_norm = nn.Identity()
    equal(layer(X, LENGTHS), want(X, LENGTHS))


@pytest.mark.parametrize(
    ("conv_norm", "name"),
    [*((norm, "conv.depthwise") for norm in NORMS), *((n, "conv.depthwise_norm") for n in NORMS if n != "group")],
)
@pytest.mark.parametrize("training", [False, True])
def test_one_called_module_leaves_the_other_as_it_was(conv_norm, name, training):
    """Statistics stay those of the real frames alone, and the running ones move once."""
    layer = layer_of(conv_norm=conv_norm).train(training)
    other = called(layer, name)
    equal(other(X, LENGTHS), layer(X, LENGTHS))
    for (n, p), q in zip(layer.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda m, n=n: f"{n}: {m}")


def test_float16_is_not_convolved_by_pytorch_on_a_cpu():
    """oneDNN may never return."""
    layer = called(layer_of(), "conv.depthwise")
    with pytest.raises(NotImplementedError, match=r"depthwise has hooks.*may never return on a CPU"):
        layer.half()(X.half(), LENGTHS)
    layer.float()
    with pytest.raises(NotImplementedError, match="may never return"), torch.autocast("cpu", torch.float16):
        layer(X, LENGTHS)
    layer = layer_of()
    want = layer(X, LENGTHS)
    got = called(layer, "conv.depthwise_norm").half()(X.half(), LENGTHS)
    torch.testing.assert_close(got.float() * REAL, want * REAL, rtol=2e-2, atol=2e-2)


def test_a_group_norm_that_must_be_called_is_refused_with_padding():
    layer = called(layer_of(conv_norm="group"), "conv.depthwise_norm")
    with pytest.raises(NotImplementedError, match=r"depthwise_norm has hooks.*statistics over the padding"):
        layer(X, LENGTHS)
    plain = layer_of(conv_norm="group")
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), plain(X), rtol=1e-4, atol=1e-5)


# --- each norm's own state -------------------------------------------------------------------------------------------


def statistics(layer):
    return [b.clone() for b in layer.conv.depthwise_norm.buffers()]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_frozen_batch_norm_stays_frozen(hooked):
    layer = layer_of(conv_norm="batch")
    want = layer(X, LENGTHS)
    if hooked:
        layer = called(layer, "conv.depthwise_norm")
    layer.train().conv.depthwise_norm.eval()
    before = statistics(layer)
    equal(layer(X, LENGTHS), want)
    assert all(map(torch.equal, statistics(layer), before))
    # and the other way round
    layer.eval().conv.depthwise_norm.train()
    assert (layer(X, LENGTHS) - want).abs().max() > 1e-3
    assert layer.conv.depthwise_norm.num_batches_tracked == before[2] + 1


@pytest.mark.parametrize("padding", ["masked", "peer"])
@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.5},
        {"momentum": None},
        {"eps": 0.3},
        {"track_running_stats": False},
        {"affine": False},
    ],
    ids=str,
)
def test_settings_of_the_batch_norm_are_its_own(padding, change):
    """Two steps and an evaluation, against PyTorch's own module on the real frames."""
    layer = layer_of(conv_norm="batch", padding=padding)
    layer.conv.depthwise_norm = nn.BatchNorm1d(16, **change)
    reference = copy.deepcopy(layer.conv.depthwise_norm)
    kept = []
    layer.conv.depthwise.register_forward_hook(lambda m, i, o: kept.append(o))
    layer.conv.pointwise2.register_forward_pre_hook(lambda m, i: kept.append(i[0]))
    for training in (True, True, False):
        layer.train(training), reference.train(training)
        layer(torch.randn(2, 9, 16), LENGTHS)
        y, got = kept[-2].transpose(1, 2), kept[-1]
        keep = REAL[..., 0] if padding == "masked" else torch.ones(2, 9, dtype=torch.bool)
        torch.testing.assert_close(got[keep], F.silu(reference(y[keep])), rtol=1e-4, atol=1e-5)
    for name, b in reference.named_buffers():
        torch.testing.assert_close(layer.conv.depthwise_norm.get_buffer(name), b)


def test_the_training_engine_leaves_other_norms_to_the_modules():
    encoder = ConformerEncoder(BASE.replace(conv_norm="batch"))
    norm = encoder.layers[0].conv.depthwise_norm
    norm.momentum = None
    assert "momentum=None" in str(encoder.explain(X))
    encoder(X, LENGTHS), encoder(X, LENGTHS)
    assert norm.num_batches_tracked == 6
    encoder.layers[0].conv.depthwise_norm = nn.LayerNorm(16)
    assert "is a LayerNorm, but the config says conv_norm='batch'" in str(encoder.explain(X))
    assert encoder(X, LENGTHS)[0].isfinite().all()


def test_sync_batch_norm_of_one_process_is_a_batch_norm():
    layer = layer_of(conv_norm="batch").train()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert type(other.conv.depthwise_norm) is nn.SyncBatchNorm
    equal(other(X, LENGTHS), layer(X, LENGTHS))
    for got, want in zip(statistics(other), statistics(layer)):
        torch.testing.assert_close(got, want)
    equal(other.eval()(X, LENGTHS), layer.eval()(X, LENGTHS))


# --- the encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", READ)
def test_encoder_runs_hooks_in_every_loop(name, gradients):
    encoder = ConformerEncoder(BASE).eval()
    with torch.set_grad_enabled(gradients):
        before, calls = encoder(X, LENGTHS)[0], []
        handle = encoder.layers[0].get_submodule(name).register_forward_hook(lambda m, i, o: calls.append(1) or 0.5 * o)
        got = encoder(X, LENGTHS)[0]
        assert len(calls) == (1 if name == "attention.pos" else 3)
        assert (got - before).abs().max() > 1e-4
        handle.remove()
        assert torch.equal(encoder(X, LENGTHS)[0], before)


@pytest.mark.parametrize("gradients", [False, True])
def test_encoder_with_adapters(gradients):
    encoder = ConformerEncoder(BASE).eval()
    merged = copy.deepcopy(encoder)
    encoder(X), merged(X)
    for name in MATRICES:
        adapter = LoRA(encoder.layers[0].get_submodule(name))
        replace(encoder.layers[0], name, adapter)
        replace(merged.layers[0], name, adapter.merged())
    with torch.set_grad_enabled(gradients):
        equal(encoder(X, LENGTHS)[0], merged(X, LENGTHS)[0])
    encoder.gradient_checkpointing = True
    encoder(X, LENGTHS)[0].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


class Wrapper(nn.Module):
    """Around a layer, with nothing of its own but a forward."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args):
        return self.inner(*args)


def test_a_wrapped_layer_finds_its_positions_inside():
    encoder = ConformerEncoder(BASE).eval()
    want = encoder(X, LENGTHS)[0]
    encoder.layers[0] = Wrapper(encoder.layers[0])
    equal(encoder(X, LENGTHS)[0], want)


# --- compiled and exported -------------------------------------------------------------------------------------------


def test_compiled_layer_sees_a_later_hook_replacement_and_mode():
    torch._dynamo.reset()
    layer = layer_of(conv_norm="batch")
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)

    def check():
        with torch.no_grad():
            for frames in (9, 12):
                x = torch.randn(2, frames, 16)
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)

    check()
    for name in ("ffn1.up", "ffn2.norm", "conv.depthwise", "conv.depthwise_norm"):
        handle = layer.get_submodule(name).register_forward_hook(lambda m, i, o: o * 0.5)
        check()
        handle.remove()
        check()
    layer.ffn1.up = LoRA(layer.ffn1.up)
    parametrizations.weight_norm(layer.ffn2.down)
    check()


def test_exported_with_an_adapter():
    layer = layer_of()
    layer.ffn1.up = LoRA(layer.ffn1.up)
    frames = torch.export.Dim("T", min=3, max=64)
    program = torch.export.export(layer, (X, LENGTHS), dynamic_shapes=({1: frames}, None)).module()
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(program(x, LENGTHS), layer(x, LENGTHS), rtol=1e-4, atol=1e-5)
