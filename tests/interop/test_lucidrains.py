"""`accelerate` on the Conformer of the package ``conformer`` (lucidrains), against the package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lcconformer import accelerate, restore

from .peers import check_alike, randomise


@pytest.fixture
def conformer():
    module = pytest.importorskip("conformer", reason="pip install 'lcconformer[test]'")

    def make(**changes) -> nn.Module:
        settings = {"depth": 2, "dim_head": 6, "heads": 3, "ff_mult": 2, "conv_kernel_size": 7}
        return randomise(module.Conformer(16, **settings | changes)).eval()

    return make


@pytest.mark.parametrize("causal", [False, True])
def test_encoder(conformer, served, causal):
    peer = conformer(conv_causal=causal)
    for block in peer.layers:
        block.attn.fn.max_pos_emb = 5  # so that positions are clipped
    model = copy.deepcopy(peer)
    assert accelerate(model, strict=True).accelerated == ("layers.0", "layers.1")
    for frames in (1, 2, 13, 40):
        x = torch.randn(2, frames, 16)
        del served[:]
        for training in (False, True):
            check_alike(model.train(training), peer.train(training), x)
        assert served == ["ops"] * 4
        model.eval(), peer.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), peer(x), rtol=0, atol=1e-5)
    assert restore(model) == ("layers.0", "layers.1")
    assert [type(m) for m in model.modules()] == [type(m) for m in peer.modules()]


@pytest.mark.parametrize("place", ["ff1.fn.fn.net.2", "ff2.fn.fn.net.4", "attn.fn.dropout", "conv.net.9"])
def test_dropout_is_in_the_same_place(conformer, served, place):
    """What drops everything is no chance."""
    peer = conformer()
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    for m in (model, peer):
        for block in m.layers:
            block.get_submodule(place).p = 1.0
        m.train()
    check_alike(model, peer, torch.randn(2, 13, 16))
    assert served == ["ops"] * 2


def test_masks_and_changes_are_left_to_the_peer(conformer, served):
    """A mask leaks through the convolution, which only the peer repeats."""
    peer = conformer().layers[0]
    block = copy.deepcopy(peer)
    accelerate(block, strict=True)
    x, mask = torch.randn(2, 13, 16), torch.arange(13) < torch.tensor([[13], [6]])
    assert torch.equal(block(x, mask=mask), peer(x, mask=mask))
    for m in (block, peer):
        m.conv.net[4].conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert torch.equal(block(x), peer(x))
    assert served == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.ff1, "scale", 1.0), "a feed-forward is scaled by 1.0, not 0.5"),
        (lambda m: setattr(m.conv.net[4].conv, "dilation", (2,)), "a convolution has a stride, a dilation or padding"),
        (lambda m: setattr(m.post_norm, "bias", None), "post_norm has no weight or no bias"),
        (lambda m: setattr(m.attn, "fn", nn.Identity()), "unknown structure: "),
    ],
)
def test_left_alone(conformer, change, reason):
    model = conformer(depth=1)
    change(model.layers[0])
    types = [type(m) for m in model.modules()]
    ((name, said),) = accelerate(model).kept
    assert name == "layers.0"
    assert said.startswith(reason), said
    assert [type(m) for m in model.modules()] == types
    ((_, said),) = accelerate(conformer(depth=1, conv_kernel_size=8)).kept
    assert said == "conv_kernel_size=8; ours are odd, up to 63"
