"""`accelerate` on ESPnet's Conformer encoder, against the package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lcconformer import accelerate, restore

from .peers import check_alike, randomise


@pytest.fixture
def encoder():
    module = pytest.importorskip(
        "espnet2.asr.encoder.conformer_encoder", reason="pip install --no-deps espnet typeguard"
    )

    def make(**changes) -> nn.Module:
        settings = {
            "output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0, "input_layer": "linear", "macaron_style": True, "rel_pos_type": "latest",
            "cnn_module_kernel": 7,
        }  # fmt: skip
        return randomise(module.ConformerEncoder(10, **settings | changes)).eval()

    return make


@pytest.mark.parametrize("activation", ["swish", "relu"])
def test_encoder(encoder, served, activation):
    """Odd sizes, whole and padded: outputs, gradients, statistics; padding included, which ESPnet's convolution sees."""
    peer = encoder(activation_type=activation)
    model = copy.deepcopy(peer)
    assert accelerate(model, strict=True).accelerated == ("encoders.0", "encoders.1")
    for frames in (1, 2, 13, 40):
        for lengths in (torch.tensor([frames, frames]), torch.tensor([frames, max(1, frames // 2)])):
            real = torch.arange(frames) < lengths[:, None]
            x = torch.randn(2, frames, 10)
            del served[:]
            for training in (False, True):
                for one in peer.encoders:
                    one.self_attn.attn = None  # weights of the last call, with their graph: no copy is made of them
                check_alike(model.train(training), peer.train(training), x, lambda m, x, n=lengths: m(x, n)[0], real)
            assert served == ["ops"] * 4
            model.eval(), peer.eval()
            with torch.no_grad():
                torch.testing.assert_close(model(x, lengths)[0][real], peer(x, lengths)[0][real], rtol=0, atol=1e-5)
            assert served[4:] == ["engine"] * 2
    assert restore(model) == ("encoders.0", "encoders.1")


@pytest.mark.parametrize("place", ["dropout", "feed_forward.dropout", "feed_forward_macaron.dropout"])
def test_dropout_is_in_the_same_place(encoder, place):
    peer = encoder().train()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    for m in (model, peer):
        for one in m.encoders:
            one.get_submodule(place).p = 1.0
    x, lengths = torch.randn(2, 13, 10), torch.tensor([13, 6])
    torch.testing.assert_close(model(x, lengths)[0], peer(x, lengths)[0], rtol=0, atol=1e-5)


def test_hidden_states_and_stochastic_depth(encoder):
    peer = encoder(stochastic_depth_rate=0.5)
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    x, lengths = torch.randn(2, 13, 10), torch.tensor([13, 13])

    def states(m: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        (_, hidden), _, _ = m(x, lengths, return_all_hs=True)
        return hidden

    for training in (False, True):  # in training the peer draws, and computes
        for a, b in zip(states(model.train(training)), states(peer.train(training)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rel_pos_type": "legacy"},
            "legacy relative positions (rel_pos_type='legacy') depend on the length of the batch",
        ),
        ({"macaron_style": False}, "not macaron style, or no convolution"),
        ({"normalize_before": False}, "normalize_before=False or concat_after=True"),
        ({"zero_triu": True}, "zero_triu=True"),
        ({"activation_type": "tanh"}, "activation Tanh"),
        (
            {"pos_enc_layer_type": "abs_pos", "selfattention_layer_type": "selfattn"},
            "self_attn is a MultiHeadedAttention; ours has relative positions ('rel_selfattn')",
        ),
    ],
)
def test_left_alone(encoder, changes, reason):
    report = accelerate(encoder(**changes))
    assert report.accelerated == ()
    assert {name for name, _ in report.kept} == {"encoders.0", "encoders.1"}
    assert all(said.startswith(reason) for _, said in report.kept), str(report)
