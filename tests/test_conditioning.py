"""What tells depths apart: nothing at first, anything after learning."""

from __future__ import annotations

import itertools

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, engine
from lcconformer.config import CONDITIONINGS

BASE = ConformerConfig(
    d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=3, dropout=0.0, sharing="cycle:2"
)
SUBSETS = [c for r in (1, 2, 4) for c in itertools.combinations(CONDITIONINGS, r)]


@pytest.fixture(autouse=True)
def _modules():
    """What is compared bit by bit here runs module by module, with conditioning or without."""
    with engine("modules"):
        yield


def conditioned(conditioning, **changes):
    """(plain encoder, the same with conditioning switched on)."""
    plain = ConformerEncoder(BASE.replace(**changes))
    encoder = ConformerEncoder(BASE.replace(conditioning=conditioning, lora_rank=3, **changes))
    missing = encoder.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("conditioning.") for name in missing)
    return plain, encoder


@pytest.mark.parametrize("conditioning", SUBSETS, ids="-".join)
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_starts_as_the_identity(conditioning, conv_norm):
    plain, encoder = conditioned(conditioning, conv_norm=conv_norm)
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 5])
    for training in (True, False):
        want = plain.train(training)(x, lengths, return_hidden_states=True)[2]
        got = encoder.train(training)(x, lengths, return_hidden_states=True)[2]
        assert all(torch.equal(g, w) for g, w in zip(got, want))
    # statistics and counters of a shared layer advance as without conditioning
    for name, buffer in plain.named_buffers():
        assert torch.equal(encoder.get_buffer(name), buffer), name


@pytest.mark.parametrize("conditioning", [(c,) for c in CONDITIONINGS], ids="-".join)
def test_learns_at_every_depth_that_ran(conditioning):
    """A gradient for each depth that ran, zeros (not None) for the others; the layer's own gradients are untouched."""
    plain, encoder = conditioned(conditioning)
    x = torch.randn(2, 9, 16)
    weight = torch.randn(2, 9, 16)
    for model in (plain, encoder):
        (model(x, depth=3)[0] * weight).sum().backward()
    gradients = dict(encoder.conditioning.named_parameters())
    assert gradients
    for name, parameter in gradients.items():
        assert parameter.shape[0] == 4, name
        moved = parameter.grad.flatten(1).abs().sum(1) > 0
        # LoRA: the product is zero, so the first factor has no gradient yet
        want = [False] * 4 if "lora_a" in name else [True, True, True, False]
        assert moved.tolist() == want, name
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(encoder.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conditioning", [(c,) for c in CONDITIONINGS], ids="-".join)
def test_tells_depths_apart(conditioning):
    """Perturbing depth 2 changes its output and leaves depth 1 alone, though both could share one layer."""
    _, encoder = conditioned(conditioning, sharing="all")
    encoder.eval()
    x = torch.randn(1, 9, 16)
    before = encoder(x, return_hidden_states=True)[2]
    with torch.no_grad():
        for parameter in encoder.conditioning.parameters():
            parameter[1] += torch.randn_like(parameter[1])
    after = encoder(x, return_hidden_states=True)[2]
    assert torch.equal(before[1], after[1])
    assert (before[2] - after[2]).abs().max() > 1e-3


def test_values():
    """Each form against its definition, on the layer itself."""
    _, encoder = conditioned(CONDITIONINGS)
    encoder.eval()
    with torch.no_grad():
        for parameter in encoder.conditioning.parameters():
            parameter.normal_(0, 0.3)
    c, layer = encoder.conditioning, encoder.layers[1]
    x = torch.randn(1, 7, 16)
    states = encoder(x, return_hidden_states=True)[2]
    h = (states[1] + c.step[1]) * (1 + c.film[1, 0]) + c.film[1, 1]
    overrides = c.overrides(layer, 1)
    norms = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {n.rsplit(".", 1)[0] for n in overrides if "norm" in n} == norms
    matrices = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)} - {"attention.pos"}
    assert {n.removesuffix(".weight") for n in overrides if "norm" not in n} == matrices
    with torch.no_grad():
        for i, name in enumerate(c._norms):
            layer.get_parameter(name).add_(c.norm_deltas[i][1])
        for i, name in enumerate(c._matrices):
            layer.get_parameter(name).add_(c.lora_b[i][1] @ c.lora_a[i][1])
    torch.testing.assert_close(states[2], layer(h), rtol=0, atol=1e-5)
