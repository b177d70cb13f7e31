"""What is attached to an accelerated layer, or was to the layer it replaced, counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcconformer import ConformerLayer, accelerate

X, LENGTHS = torch.randn(2, 9, 16), torch.tensor([9, 5])


class Lora(nn.Module):
    """A low-rank adapter around a linear map, as PEFT wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


@pytest.fixture
def peer(torchaudio_conformer) -> nn.Module:
    model = nn.ModuleDict({"encoder": torchaudio_conformer.Conformer(16, 2, 24, 2, 5)})
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model


def test_accelerate_keeps_a_frozen_norm_frozen(peer):
    peer.train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
            module.momentum = 0.3
    wanted = peer["encoder"](X, LENGTHS)[0]
    before = {n: b.clone() for n, b in peer.state_dict().items()}
    assert len(accelerate(peer).replaced) == 2
    norms = [m for m in peer.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [(m.training, m.momentum) for m in norms] == [(False, 0.3)] * 2
    found = peer["encoder"](X, LENGTHS)[0]
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(b, before[n]) for n, b in peer.state_dict().items())


def test_an_adapter_in_an_accelerated_layer_counts(peer):
    peer.eval()
    accelerate(peer)
    layer = next(m for m in peer.modules() if isinstance(m, ConformerLayer))
    plain = peer["encoder"](X, LENGTHS)[0]
    layer.ffn1.up = Lora(layer.ffn1.up)
    out = peer["encoder"](X, LENGTHS)[0]
    assert not torch.allclose(out, plain)
    out.sum().backward()
    assert layer.ffn1.up.b.grad.abs().sum() > 0
