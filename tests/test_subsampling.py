"""Front ends: lengths, values, and no trace of padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.subsampling import FrontEnd

FORMS = [("none", 1), ("stack", 2), ("stack", 3), ("conv", 2), ("conv", 4)]


def front_end(kind, factor, **changes):
    config = ConformerConfig(
        d_model=8, num_heads=2, input_dim=10, subsampling=kind, subsampling_factor=factor, **changes
    )
    return FrontEnd(config).double()


@pytest.mark.parametrize(("kind", "factor"), FORMS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 17])
def test_lengths(kind, factor, frames):
    """ceil(T / factor), which is what comes out, for every length within T."""
    front = front_end(kind, factor)
    lengths = torch.arange(frames + 1)
    out, out_lengths = front(torch.randn(frames + 1, frames, 10, dtype=torch.float64), lengths)
    assert out.shape == (frames + 1, -(-frames // factor), 8)
    assert out_lengths.tolist() == [-(-n // factor) for n in range(frames + 1)]
    assert torch.equal(out_lengths, front.lengths(lengths))


@pytest.mark.parametrize(("kind", "factor"), FORMS)
def test_batch_equals_single_with_poisoned_padding(kind, factor):
    front = front_end(kind, factor)
    lengths = torch.tensor([17, 1, 2, 3, 9, 16])
    x = torch.randn(6, 17, 10, dtype=torch.float64)
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = torch.nan
    out, out_lengths = front(x, lengths)
    for i, (n, m) in enumerate(zip(lengths.tolist(), out_lengths.tolist())):
        alone, alone_lengths = front(x[i : i + 1, :n], None)
        assert alone_lengths is None
        assert alone.shape[1] == m
        torch.testing.assert_close(out[i, :m], alone[0], rtol=0, atol=1e-12)


def test_stack_values():
    front = front_end("stack", 3)
    x = torch.randn(1, 7, 10, dtype=torch.float64)
    padded = torch.cat((x[0], torch.zeros(2, 10, dtype=torch.float64)))
    want = front.project(padded.reshape(3, 30))
    assert torch.equal(front(x, None)[0][0], want)


def test_conv_values():
    front = front_end("conv", 4)
    x = torch.randn(1, 9, 10, dtype=torch.float64)
    h = x[:, None]
    for conv in front.convs:
        h = F.relu(F.conv2d(h, conv.weight, conv.bias, stride=2, padding=1))  # [1, d_model, T', F']
    assert h.shape == (1, 8, 3, 3)
    want = front.project(torch.stack([h[0, :, t].reshape(-1) for t in range(3)]))
    torch.testing.assert_close(front(x, None)[0][0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "factor"), FORMS)
def test_in_the_encoder(kind, factor):
    config = ConformerConfig(
        d_model=8, num_heads=2, ffn_dim=8, num_layers=2, conv_kernel_size=3, input_dim=10,
        subsampling=kind, subsampling_factor=factor,
    )  # fmt: skip
    encoder = ConformerEncoder(config).eval()
    lengths = torch.tensor([9, 4])
    out, out_lengths = encoder(torch.randn(2, 9, 10), lengths)
    assert out.shape == (2, -(-9 // factor), 8)
    assert torch.equal(out_lengths, encoder.subsampled_lengths(lengths))


def test_needs_input_dim():
    with pytest.raises(ValueError, match=r"FrontEnd: config\.input_dim is None; give the width"):
        FrontEnd(ConformerConfig())


@pytest.mark.parametrize(("kind", "factor"), FORMS)
@pytest.mark.parametrize("frames", [0, 9])
def test_dtype_other_than_the_weights(kind, factor, frames):
    front = front_end(kind, factor).float()
    x = torch.zeros(2, frames, 10, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"features have dtype torch\.bfloat16, the weights torch\.float32"):
        front(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert front(x, None)[0].shape == (2, -(-frames // factor), 8)
