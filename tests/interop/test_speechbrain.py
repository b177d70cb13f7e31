"""`accelerate` on SpeechBrain's Conformer encoder, against the package's own source."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from lcconformer.bench.providers import speechbrain as speechbrain_source
from torch import nn

from lcconformer import accelerate, restore

from .peers import check_alike, randomise


@pytest.fixture(scope="module")
def speechbrain():
    """SpeechBrain's own encoder, layers and attention."""
    if (why := speechbrain_source.missing()) is not None:
        pytest.skip(why)
    with speechbrain_source.source() as module:
        yield module


@pytest.fixture
def encoder(speechbrain):
    def make(attention_type="RoPEMHA", **changes) -> nn.Module:
        settings = {"num_layers": 2, "d_model": 16, "d_ffn": 24, "nhead": 2, "kernel_size": 7}
        return randomise(speechbrain.ConformerEncoder(**settings | changes, attention_type=attention_type)).eval()

    return make


def check(model: nn.Module, peer: nn.Module, x: torch.Tensor, padding: torch.Tensor | None) -> None:
    """Compare encoders, at frames of padding too."""

    def call(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y, maps = m(x, src_key_padding_mask=padding)
        assert maps == [None, None]
        return y

    check_alike(model, peer, x, call)


@pytest.mark.parametrize("activation", ["Swish", "GELU", "ReLU"])
@pytest.mark.parametrize("bias", [True, False])
def test_encoder(speechbrain, encoder, served, activation, bias):
    """Odd sizes, whole and padded: padding is seen by the convolution, and left as it is by its output."""
    peer = encoder(activation=getattr(speechbrain if activation == "Swish" else nn, activation), bias=bias)
    model = copy.deepcopy(peer)
    assert accelerate(model, strict=True).accelerated == ("layers.0", "layers.1")
    assert list(model.state_dict()) == list(peer.state_dict())
    for frames in (1, 2, 13, 40):
        x = torch.randn(2, frames, 16)
        padding = torch.arange(frames) >= torch.tensor([[frames], [max(1, frames // 2)]])
        for training in (False, True):
            for mask in (None, padding):
                del served[:]
                check(model.train(training), peer.train(training), x, mask)
                assert served == ["ops"] * 2
    assert restore(model) == ("layers.0", "layers.1")


@pytest.mark.parametrize(
    "place", ["ffn_module1.1.ffn.2", "ffn_module2.2", "convolution_module.after_conv.3", "mha_layer"]
)
def test_dropout_is_in_the_same_place(encoder, served, place):
    peer = encoder()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    for m in (model, peer):
        for one in m.layers:
            dropout = one.get_submodule(place)
            dropout.train()
            if place == "mha_layer":
                dropout.dropout = 1.0
            else:
                dropout.p = 1.0
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(model(x)[0], peer(x)[0], rtol=0, atol=1e-5, equal_nan=True)
    assert served == ([] if place == "mha_layer" else ["ops"] * 2)  # of all attention is left to the peer


def test_what_the_peer_computes(speechbrain, encoder, served):
    """Other masks, chunks, streams, and changed modules."""
    peer = encoder()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    x, before = torch.randn(2, 13, 16), torch.arange(13) < torch.tensor([[4], [0]])
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    config = importlib.import_module("speechbrain.utils.dynamic_chunk_training").DynChunkTrainConfig(4, 2)
    for options in ({"src_mask": future}, {"src_key_padding_mask": before}, {"dynchunktrain_config": config}):
        assert torch.equal(model(x, **options)[0], peer(x, **options)[0])
    streams = [m.forward_streaming(x, m.make_streaming_context(config))[0] for m in (model, peer)]
    assert torch.equal(*streams)
    for m in (model, peer):
        m.layers[0].norm1.register_forward_hook(lambda module, inputs, output: output * 0.5)
    torch.testing.assert_close(*(m(x)[0] for m in (model, peer)), rtol=0, atol=1e-5)
    assert served == ["ops"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_type": "RelPosMHAXL"}, "its attention (RelPosMHAXL) returns the weights of every pair of frames"),
        ({"attention_type": "regularMHA"}, "mha_layer is a MultiheadAttention; ours has RoPEMHA"),
        ({"causal": True}, "causal=True"),
        ({"activation": nn.Tanh}, "activation Tanh"),
    ],
)
def test_left_alone(encoder, changes, reason):
    model = encoder(**changes)
    kinds = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert report.accelerated == ()
    assert {name for name, _ in report.kept} == {"layers.0", "layers.1"}
    assert all(said.startswith(reason) for _, said in report.kept), str(report)
    assert [type(m) for m in model.modules()] == kinds
