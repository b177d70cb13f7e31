"""Losing the fast engine is said once, is an error with LCCONFORMER_STRICT=1, and `explain` tells what serves a call."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lcconformer import Conformer, ConformerConfig, ConformerEncoder, backend, engine, loop
from lcconformer.ops.registry import OPS, Choice, record

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5, dropout=0.0)
NAMES = ["relpos_attention", "glu_depthwise_conv", "feed_forward", "residual_layer_norm"]
X = torch.randn(2, 9, 16)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(loop, "_said", set())


def hooked(**changes):
    encoder = ConformerEncoder(BASE.replace(**changes))
    encoder.layers[0].ffn1.up.register_forward_hook(lambda *_: None)
    return encoder


@pytest.mark.parametrize("gradients", [False, True])
def test_losing_the_engine_is_said_once_for_each_reason(gradients, caplog):
    encoder = hooked().eval()
    with caplog.at_level(logging.WARNING, "lcconformer"), torch.set_grad_enabled(gradients):
        encoder(X), encoder(X)
        assert [r.message for r in caplog.records] == [
            "ConformerEncoder runs module by module, which is slower (layers.0.ffn1.up has hooks, which would not run)"
        ]
        encoder.layers[0].norm = nn.Sequential(encoder.layers[0].norm)
        encoder.layers[0].ffn1.up = nn.Linear(16, 24)
        encoder(X)
    assert "(layers.0.norm is a Sequential)" in caplog.records[-1].message
    assert len(caplog.records) == 2


@pytest.mark.parametrize("gradients", [False, True])
def test_strict_makes_it_an_error(gradients, monkeypatch):
    monkeypatch.setenv("LCCONFORMER_STRICT", "1")
    with torch.set_grad_enabled(gradients):
        ConformerEncoder(BASE).eval()(X)
        with pytest.raises(NotImplementedError, match=r"ffn1\.up has hooks.*LCCONFORMER_STRICT=1 makes the loss"):
            hooked()(X)
        with pytest.raises(NotImplementedError, match=r"dtype torch\.float16 is not one of"):
            ConformerEncoder(BASE).half().eval()(X.half())
        mixed = ConformerEncoder(BASE)
        mixed.layers[0].attention.out.bfloat16()
        with pytest.raises(NotImplementedError, match=r"the input is torch\.float32 and"):
            mixed(X)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_costs_nothing_or_was_asked_for_is_no_loss(monkeypatch, caplog):
    monkeypatch.setenv("LCCONFORMER_STRICT", "1")
    encoder, plain = hooked(), ConformerEncoder(BASE)
    with caplog.at_level(logging.WARNING, "lcconformer"):
        for forced in (engine("modules"), backend("torch")):
            with forced:
                encoder(X)
                with torch.no_grad():
                    encoder(X)
        with backend("torch"):
            torch.func.grad(lambda x: plain(x)[0].sum())(X)
            torch._dynamo.reset()
            torch.compile(plain, backend="eager")(X)
        torch.jit.trace(plain.eval(), (X, torch.tensor([9, 4])), check_trace=False)
        for changes in (
            {"position": "rotary"},
            {"conditioning": ("film",)},
            {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
        ):
            ConformerEncoder(BASE.replace(**changes))(X)
            with torch.no_grad():
                ConformerEncoder(BASE.replace(**changes)).eval()(X)
        ConformerEncoder(BASE)(X[:, :0])
        with torch.no_grad():
            ConformerEncoder(BASE.replace(dropout=0.1))(X)  # in training mode
        Conformer(16, 2, 24, 1, 5)(X, torch.tensor([9, 4]))
    assert not caplog.records


def test_where_auto_would_not_take_the_engine_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(loop.inference, "slower", lambda stack, x: ["not measured"])
    monkeypatch.setattr(loop.training, "slower", lambda x, kernels: ["not measured"])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            found = loop.decide(hooked().eval(), X, 2)
        assert (found.engine, found.lost) == ("modules", False)
        assert found.against == ("layers.0.ffn1.up has hooks, which would not run", "not measured")


def test_explains_the_engines():
    encoder = ConformerEncoder(BASE.replace(input_dim=10)).eval()
    x, lengths = torch.randn(2, 9, 10), torch.tensor([9, 4])
    with torch.no_grad():
        said = encoder.explain(x, lengths, depth=1)
    assert (said.engine, said.against, said.ops) == ("inference", (), {"shared_loop": Choice("shared_loop", "cpu")})
    assert str(said) == "loops run by the inference engine\nshared_loop  cpu"
    said = encoder.explain(x, lengths)
    assert (said.engine, said.against) == ("training", ())
    assert {name: choice.backend for name, choice in said.ops.items()} == dict.fromkeys(NAMES, "cpu")
    with pytest.raises(ValueError, match="depth is 3"):
        encoder.explain(x, depth=3)
    with pytest.raises(ValueError, match="lengths"):
        encoder.explain(x, torch.tensor([9, 40]))


def test_explains_inference_on_a_gpu(monkeypatch):
    """The chain of kernels, or why the modules are recorded; neither is held back."""
    from lcconformer.loop import inference

    x, asked = SimpleNamespace(device=torch.device("cuda", 0), shape=(2, 9, 16)), []
    stack = ConformerEncoder(BASE)
    against = []
    monkeypatch.setattr(inference.chain, "reasons", lambda _stack, _x, rows: asked.append(rows) or against)
    monkeypatch.setattr(inference, "explain_ops", lambda _stack, _x: {"feed_forward": Choice("feed_forward", "triton")})
    assert inference.slower(stack, x) == []
    assert inference.explain(stack, x) == {"shared_loop": Choice("shared_loop", "triton")}
    assert asked == [2 * 64]  # the frames of the bucket
    against = ["why"]
    said = loop.Explanation("inference", (), inference.explain(stack, x))
    assert str(said).splitlines()[1:] == ["shared_loop   modules", "  not triton: why", "feed_forward  triton"]


def test_explains_why_nothing_faster_serves():
    encoder = hooked()
    said = encoder.explain(X)
    assert said.engine == "modules"
    assert said.against == ("layers.0.ffn1.up has hooks, which would not run",)
    assert "module by module\n  no engine of the loop: layers.0.ffn1.up has hooks" in str(said)
    with engine("loop"):
        said = encoder.explain(X)
        assert said.engine is None
        assert "the call raises" in str(said)
        with pytest.raises(NotImplementedError, match=r"engine 'loop' was forced but .*ffn1\.up has hooks"):
            encoder(X)
    with backend("cuda"):
        said = encoder.explain(X)
    assert said.ops["relpos_attention"].backend is None
    assert (
        "relpos_attention: backend 'cuda' was forced but cannot serve these inputs: the tensors are on device type"
        in str(said)
    )


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args):
        return self.inner(*args)


def test_explains_encoders_whose_layers_are_wrapped_or_replaced():
    encoder = ConformerEncoder(BASE)
    encoder.layers[0] = Wrapper(encoder.layers[0])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            said = encoder.explain(X)
            assert said.against[0] == "layers.0 is a Wrapper"
            assert list(said.ops) == NAMES
    encoder.layers[0] = nn.Identity()
    assert encoder.explain(X).against == ("layers.0 is a Identity",)


def test_what_is_explained_is_what_runs():
    for encoder in (ConformerEncoder(BASE), hooked(), ConformerEncoder(BASE.replace(activation="gelu"))):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                said = encoder.explain(X)
                with record() as served:
                    out, _ = encoder(X)
                assert {name: choice.backend for name, choice in said.ops.items()}.items() >= served.items()
                engine_ran = type(out.grad_fn).__name__ == "LoopFnBackward" or "shared_loop" in served
                assert engine_ran == (said.engine in ("training", "inference"))


def test_explaining_computes_no_loop_and_leaves_no_trace(caplog, monkeypatch):
    monkeypatch.setattr("lcconformer.ops.registry._said", set())
    encoder = ConformerEncoder(BASE.replace(conv_norm="batch")).half()
    with caplog.at_level(logging.WARNING, "lcconformer"), record() as served:
        assert encoder.explain(X.half()).ops["feed_forward"].backend == "torch"
        assert not caplog.records
        assert not served
        assert encoder.layers[0].conv.depthwise_norm.num_batches_tracked == 0
        encoder(X.half())
    assert {name for name in OPS if any(name in r.message for r in caplog.records)} == set(NAMES)
