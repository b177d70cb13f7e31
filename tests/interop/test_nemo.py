"""`accelerate` on NeMo's Conformer encoder, against the package's own source."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from lcconformer.bench.providers import nemo as nemo_source
from torch import nn

from lcconformer import accelerate, restore

from . import peers


@pytest.fixture(scope="session")
def nemo():
    """NeMo's own encoder, layers and attention."""
    if (why := nemo_source.missing()) is not None:
        pytest.skip(why)
    with nemo_source.source() as module:
        yield module


@pytest.fixture
def encoder(nemo):
    def make(**changes) -> nn.Module:
        settings = {
            "feat_in": 10, "n_layers": 2, "d_model": 16, "subsampling": None, "ff_expansion_factor": 2, "n_heads": 2,
            "conv_kernel_size": 7, "dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_emb": 0.0, "dropout_att": 0.0,
            "pos_emb_max_len": 50,
        }  # fmt: skip
        return peers.randomise(nemo.ConformerEncoder(**settings | changes)).eval()

    return make


def check_alike(model: nn.Module, peer: nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> None:
    """Compare encoders on features ``[B, 10, T]`` of utterances with these lengths."""

    def call(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y, out_lengths = m(audio_signal=x, length=lengths)
        assert torch.equal(out_lengths, lengths)
        return y.mT

    peers.check_alike(model, peer, x, call, torch.arange(x.shape[-1]) < lengths[:, None])


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, "engine"),
        ({"untie_biases": False, "use_pytorch_sdpa": True}, "engine"),
        ({"use_bias": False, "xscaling": False}, "ops"),
        ({"conv_norm_type": "layer_norm"}, "engine"),
        ({"conv_norm_type": "group_norm4"}, "ops"),
        ({"conv_norm_type": "instance_norm"}, "ops"),
        ({"conv_norm_type": "fused_batch_norm"}, "ops"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_encoder(encoder, served, changes, runs):
    """Odd sizes, whole and padded: outputs, gradients and statistics, and which computation of ours gave them."""
    peer = encoder(**changes)
    model = copy.deepcopy(peer)
    assert accelerate(model, strict=True).accelerated == ("layers.0", "layers.1")
    for frames in (2, 13, 40):
        for lengths in (torch.tensor([frames, frames]), torch.tensor([frames, max(1, frames // 2)])):
            x = torch.randn(2, 10, frames)
            del served[:]
            for training in (False, True):
                check_alike(model.train(training), peer.train(training), x, lengths)
            assert served == ["ops"] * 4
            model.eval(), peer.eval()
            real = torch.arange(frames) < lengths[:, None]
            with torch.no_grad():
                got, want = (m(audio_signal=x, length=lengths)[0].mT[real] for m in (model, peer))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert served[4:] == [runs] * 2
    assert restore(model) == ("layers.0", "layers.1")
    assert [type(m) for m in model.modules()] == [type(m) for m in peer.modules()]


@pytest.mark.parametrize("place", ["dropout", "feed_forward1.dropout", "feed_forward2.dropout"])
def test_dropout_is_in_the_same_place(encoder, served, place):
    """What drops everything is no chance."""
    peer = encoder()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    for m in (model, peer):
        for one in m.layers:
            one.get_submodule(place).p = 1.0
        m.train()
    x, lengths = torch.randn(2, 10, 13), torch.tensor([13, 6])
    check_alike(model, peer, x, lengths)
    assert served == ["ops"] * 2


@pytest.mark.parametrize("sdpa", [False, True])
def test_dropout_of_attention(encoder, sdpa):
    """With value vectors of ones, a head gives the part of its weights that was kept, over 1 - p: 1 on average."""
    model = encoder(n_layers=1, dropout_att=0.25, use_pytorch_sdpa=sdpa, pos_emb_max_len=64)
    accelerate(model, strict=True)
    one = model.layers[0]
    with torch.no_grad():
        for parameter in one.self_attn.linear_v.parameters():
            parameter.fill_(float(parameter.dim() == 1))
        one.self_attn.linear_out.weight.copy_(torch.eye(16))
        one.self_attn.linear_out.bias.zero_()
    h, positions = torch.randn(2, 64, 16), model.pos_enc(torch.randn(2, 64, 16))[1]
    kept = one.train()._attend(positions, h, None).detach()
    assert kept.std() > 0.02
    assert abs(float(kept.mean()) - 1) < 0.05
    torch.testing.assert_close(one.eval()._attend(positions, h, None), torch.ones(2, 64, 16))


@contextlib.contextmanager
def accessed(model: nn.Module):
    model.update_access_cfg({"save_encoder_tensors": True})
    model.set_access_enabled(access_enabled=True)
    try:
        yield
    finally:
        model.update_access_cfg({"save_encoder_tensors": False})
        model.reset_registry()


def test_what_is_left_to_the_peer(encoder, served):
    """Limited context, caches, masks that disagree, recorded tensors, adapters, hooks: the peer's own results."""
    x, lengths = torch.randn(2, 10, 13), torch.tensor([13, 6])
    for changes in ({"att_context_size": [4, 2]}, {"att_context_size": [4, 1], "att_context_style": "chunked_limited"}):
        peer = encoder(**changes)
        model = copy.deepcopy(peer)
        accelerate(model, strict=True)
        assert torch.equal(model(x, lengths)[0], peer(x, lengths)[0])
        caches = peer.get_initial_cache_state(batch_size=2)
        for got, want in zip(model(x, lengths, *caches), peer(x, lengths, *caches), strict=True):
            assert torch.equal(got, want)
    peer = encoder()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    h, positions = peer.pos_enc(torch.randn(2, 13, 16))
    pad, scores = peer._create_masks([-1, -1], lengths, 13, None, h.device)
    everything, _ = peer._create_masks([-1, -1], torch.tensor([13, 13]), 13, None, h.device)
    for masks in ((scores, pad.flip(1)), (scores, everything), (scores, None), (None, pad)):
        want = peer.layers[0](h, att_mask=masks[0], pos_emb=positions, pad_mask=masks[1])
        assert torch.equal(model.layers[0](h, att_mask=masks[0], pos_emb=positions, pad_mask=masks[1]), want)
    for m in (model, peer):
        with accessed(m):
            m(x, lengths)
            assert [len(one._registry["encoder"]) for one in m.layers] == [1, 1]
    for m in (model, peer):
        for one in m.layers:
            one.adapter_layer = nn.ModuleDict({"one": nn.Identity()})
            one.forward_enabled_adapters = lambda given: {**given, "x": given["x"] * 0.5}
    assert torch.equal(model(x, lengths)[0], peer(x, lengths)[0])
    for m in (model, peer):
        for one in m.layers:
            del one.adapter_layer
            one.self_attn.register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert torch.equal(model(x, lengths)[0], peer(x, lengths)[0])
    for m in (model, peer):  # as NeMo changes the kind of attention of a loaded model
        for one in m.layers:
            one.self_attention_model = "abs_pos"
    with pytest.raises(TypeError, match="pos_emb"):
        model(x, lengths)
    assert served == []


def test_changed_modules_are_called(encoder, served):
    """A hook on the depthwise convolution, which pads for itself."""
    peer = encoder()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    for m in (model, peer):
        m.layers[0].conv.depthwise_conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    check_alike(model, peer, torch.randn(2, 10, 13), torch.tensor([13, 6]))
    assert served == ["ops"] * 2


def test_stochastic_depth(encoder):
    """The encoder of the peer drops layers, ours or not."""
    peer = encoder(stochastic_depth_drop_prob=0.5)
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    x, lengths = torch.randn(2, 10, 13), torch.tensor([13, 13])
    for seed in range(4):
        found = []
        for m in (model.train(), peer.train()):
            torch.manual_seed(seed)
            found.append(m(x, lengths)[0])
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"self_attention_model": "abs_pos"}, "self_attention_model='abs_pos'; ours has 'rel_pos'"),
        (
            {"self_attention_model": "rel_pos_local_attn", "att_context_size": [4, 4]},
            "self_attention_model='rel_pos_local_attn'; ours has 'rel_pos'",
        ),
        ({"conv_context_size": "causal"}, "the depthwise convolution is padded by (6, 0) frames (conv_context_size)"),
        ({"conv_context_size": [4, 2]}, "the depthwise convolution is padded by (4, 2) frames (conv_context_size)"),
        ({"conv_kernel_size": 65}, "the depthwise convolution has a kernel of 65; ours go up to 63"),
    ],
)
def test_left_alone(encoder, changes, reason):
    model = encoder(**changes)
    types = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert report.accelerated == ()
    assert {name for name, _ in report.kept} == {"layers.0", "layers.1"}
    assert all(said.startswith(reason) for _, said in report.kept), str(report)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "fc_factor", 1.0), "a feed-forward is scaled by 1.0, not 0.5"),
        (lambda m: setattr(m.conv, "pointwise_activation", nn.SiLU()), "pointwise_activation=SiLU(), not 'glu_'"),
        (lambda m: setattr(m, "adapter_layer", nn.ModuleDict({"a": nn.Identity()})), "it has adapters"),
        (lambda m: setattr(m.feed_forward1, "activation", nn.Tanh()), "activation Tanh"),
        (lambda m: setattr(m, "self_attn", nn.Identity()), "self_attn is a Identity"),
        (lambda m: delattr(m, "conv"), "unknown structure: "),
    ],
)
def test_changed_layers_are_left_alone(encoder, change, reason):
    model = encoder(n_layers=1)
    change(model.layers[0])
    ((name, said),) = accelerate(model).kept
    assert name == "layers.0"
    assert said.startswith(reason), said
