"""Encoders with weights in 8 bits: what they are, how near to the others, how they are saved, moved and refused."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder, backend, depth_errors, engine, quantize
from lcconformer.quantization import QuantizedLinear

from .conftest import with_random_values

CONFIG = ConformerConfig(d_model=48, num_heads=2, ffn_dim=300, num_layers=3, conv_kernel_size=5, input_dim=20)


def make_encoder(**changes) -> ConformerEncoder:
    encoder = ConformerEncoder(CONFIG.replace(**changes)).eval()
    with_random_values(encoder)
    return encoder


@pytest.mark.parametrize(
    "changes",
    [{}, {"sharing": "none"}, {"conv_norm": "batch", "attention_bias": False}, {"conv_bias": False, "position": "none"},
     {"position": "rotary", "rotary_input": "hidden"}, {"conditioning": ("film", "layer_norm")}],
    ids=str,
)  # fmt: skip
def test_is_near_the_encoder_it_was_made_of(changes):
    encoder = make_encoder(**changes)
    small = quantize(encoder)
    matrices = {n: m for n, m in small.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(matrices) == 8 * len(small.layers)  # two feed-forwards of two, two of attention, two of the convolution
    for name, matrix in matrices.items():
        weight = encoder.get_submodule(name).weight
        assert matrix.weight.abs().amax(1).eq(127).all()
        assert ((matrix.weight * matrix.scale[:, None] - weight).abs() <= 0.5001 * matrix.scale[:, None]).all()
    theirs, ours = encoder.state_dict(), small.state_dict()
    for name in theirs.keys() - {f"{n}.weight" for n in matrices}:
        assert torch.equal(ours[name], theirs[name]), name
    errors = depth_errors(encoder, small, torch.randn(2, 50, 20), torch.tensor([50, 31]))
    assert all(0 < error < 0.03 for error in errors), errors


def test_a_row_of_zeros_stays_zero():
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[0].ffn1.up.weight[3] = 0
        encoder.layers[0].ffn1.up.weight[4] = 1e-44
    up = quantize(encoder).layers[0].ffn1.up
    assert up.weight[3:5].count_nonzero() == 0
    assert up.scale.isfinite().all()


def test_the_encoder_is_left_alone_and_its_mode_kept():
    encoder = make_encoder().train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    small = quantize(encoder)
    assert small.training
    assert not quantize(encoder.eval()).training
    with torch.no_grad():
        for x in small.parameters():
            x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())


def test_saved_and_loaded(tmp_path):
    small, x = quantize(make_encoder(conditioning=("film",))), torch.randn(1, 40, 20)
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["weights"] == "int8"
    loaded = ConformerEncoder.from_pretrained(tmp_path)
    again = copy.deepcopy(small)
    unpickled = pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        for other in (loaded, again, unpickled):
            assert torch.equal(other(x)[0], small(x)[0])
    whole = make_encoder()
    whole.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / part / "model.safetensors").stat().st_size for part in (".", "whole")]
    assert sizes[0] < 0.5 * sizes[1]


def test_scales_stay_float32_when_the_encoder_is_moved():
    small = quantize(make_encoder())
    up = small.layers[0].ffn1.up
    scale = up.scale.clone()
    small.bfloat16()
    assert small.layers[0].norm.weight.dtype == torch.bfloat16
    assert up.weight.dtype == torch.int8
    assert torch.equal(up.scale, scale)
    small.to("meta")
    assert up.scale.is_meta
    assert up.scale.dtype == torch.float32


def test_quantized_in_bfloat16(tmp_path):
    small = quantize(make_encoder().bfloat16())
    assert small.layers[0].ffn1.up.scale.dtype == torch.float32
    assert small.layers[0].norm.weight.dtype == torch.bfloat16
    x = torch.randn(1, 30, 20, dtype=torch.bfloat16)
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ConformerEncoder.from_pretrained(tmp_path)(x)[0], small(x)[0])


def test_counts_its_weights():
    encoder = make_encoder()
    assert quantize(encoder).summary() == encoder.summary()
    linear = nn.Linear(3, 5)
    assert repr(QuantizedLinear(3, 5)) == repr(linear).replace("Linear", "QuantizedLinear")


def test_the_rest_can_be_trained():
    small = quantize(make_encoder(dropout=0.1)).train()
    weights = [b.clone() for name, b in small.named_buffers() if b.dtype == torch.int8]
    small(torch.randn(2, 30, 20))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    torch.optim.AdamW(small.parameters()).step()
    assert all(torch.equal(a, b) for a, b in zip(weights, (b for b in small.buffers() if b.dtype == torch.int8)))
    with pytest.raises(NotImplementedError, match="weights are int8, which the modules train around"), engine("loop"):
        small(torch.randn(2, 30, 20))


def test_exports():
    small, x = quantize(make_encoder()), torch.randn(1, 40, 20)
    program = torch.export.export(small, (x,), {"depth": 2})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad(), engine("modules"), backend("torch"):
        torch.testing.assert_close(torch.export.load(file).module()(x, depth=2)[0], small(x, depth=2)[0])


def test_refusals():
    encoder = make_encoder()
    with pytest.raises(ValueError, match="weights is 'int4'; expected 'int8'"):
        quantize(encoder, "int4")
    small = quantize(encoder)
    for again in (quantize, lcconformer.share):
        with pytest.raises(ValueError, match="the weights of the encoder are int8 already"):
            again(small)
    with pytest.raises(ValueError, match="weights is 'int8'; expected 'float' with conditioning 'lora'"):
        quantize(make_encoder(conditioning=("lora",)))
    with pytest.raises(ValueError, match="weights is 'int2'; expected one of 'float', 'int8'"):
        CONFIG.replace(weights="int2")
    with torch.no_grad():
        encoder.layers[0].ffn2.down.weight[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.0\.ffn2\.down\.weight has values that are not finite"):
        quantize(encoder)
