"""The Triton kernels of feed_forward, interpreted on the CPU or compiled on a GPU, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import feed_forward as kernels
from lcconformer.kernels.common import dropout_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
pytestmark = pytest.mark.usefixtures("poisoned")


def run(tensors, dout, seed=None, dropout_p=0.0, scale=0.5):
    out, *saved = kernels.forward(*tensors, seed, scale, dropout_p, EPS, True)
    dx, dnorm, dw1, db1, dw2, db2 = kernels.backward(dout, *tensors[:6], *saved, seed, scale, dropout_p)
    return {"out": out, **dict(zip(("d" + n for n in NAMES), (dx, *dnorm, dw1, db1, dw2, db2)))}


def eager(tensors, dout, dtype, keep=(1.0, 1.0), scale=0.5):
    """The same from PyTorch's operators; ``keep``: factors that dropout gives the hidden units and the output."""
    leaves = [None if p is None else p.to(dtype, copy=True).requires_grad_() for p in tensors]
    x, norm_weight, norm_bias, w1, b1, w2, b2 = leaves
    hidden = F.silu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), w1, b1)) * keep[0]
    out = x + scale * (F.linear(hidden, w2, b2) * keep[1])
    out.backward(dout.to(dtype))
    return {"out": out.detach(), **{"d" + n: p.grad for n, p in zip(NAMES, leaves) if p is not None}}


def make_inputs(shape, f, dtype):
    d = shape[-1]
    tensors = (
        torch.randn(shape), 0.5 + torch.rand(d), torch.randn(d),
        torch.randn(f, d) / d**0.5, torch.randn(f), torch.randn(d, f) / f**0.5, torch.randn(d),
    )  # fmt: skip
    return [p.to(DEVICE, dtype) for p in tensors], torch.randn(shape).to(DEVICE, dtype)


def check(assert_close, tensors, dout, keep=None, **kwargs):
    out = run(tensors, dout, **kwargs)
    low_keep = ref_keep = (1.0, 1.0)
    if keep is not None:
        low_keep, ref_keep = ([k.to(d) for k in keep] for d in (dout.dtype, torch.float64))
    scale = kwargs.get("scale", 0.5)
    ref = eager(tensors, dout, torch.float64, ref_keep, scale)
    low = eager(tensors, dout, dout.dtype, low_keep, scale)
    for name, value in ref.items():
        # a sum over rows rounds like its terms
        sums = name not in ("out", "dx")
        magnitude = dout.shape[:-1].numel() ** 0.5 * dout.abs().max().item() if sums else 0.0
        assert_close(name, out[name], value, low[name], 2 if name == "out" else 3, magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("shape", "f"), [((1, 1, 16), 64), ((2, 7, 24), 150), ((1, 65, 70), 33), ((3, 63, 8), 8)])
def test_equals_the_oracle(assert_close, shape, f, dtype):
    check(assert_close, *make_inputs(shape, f, dtype))


def test_programs_of_several_row_blocks(assert_close):
    """More than 128 blocks of 16 rows: a backward program walks more than one."""
    check(assert_close, *make_inputs((1, 2100, 8), 8, torch.float32), scale=1.0)


def test_no_biases(assert_close):
    tensors, dout = make_inputs((2, 9, 24), 40, torch.float32)
    tensors[4] = tensors[6] = None
    check(assert_close, tensors, dout)


def test_strides(assert_close):
    (x, *rest), dout = make_inputs((4, 6, 24), 40, torch.float32)
    rest[2] = rest[2].t().contiguous().t()
    rest[4] = torch.randn(24, 80, device=DEVICE)[:, ::2]
    rest[3] = torch.ones(1, device=DEVICE).expand(40)
    rest[0], rest[5] = torch.randn(24, 2, device=DEVICE).unbind(1)
    check(assert_close, [x.transpose(0, 1), *rest], dout.transpose(0, 1))
    check(
        assert_close,
        [x.transpose(1, 2).contiguous().transpose(1, 2), *rest],
        torch.ones((), device=DEVICE).expand(4, 6, 24),
    )


def test_wide_stream_with_narrow_weights(assert_close):
    """As under autocast: x float32, weights float16; the branch rounds to float16, the stream does not."""
    tensors, dout = make_inputs((2, 9, 24), 40, torch.float32)
    for i in range(3, 7):
        tensors[i] = tensors[i].half()
    out = run(tensors, dout)
    ref = eager(tensors, dout, torch.float64)
    low = eager(tensors, dout, torch.float16)
    assert out["out"].dtype == out["dx"].dtype == torch.float32
    assert out["dw1"].dtype == torch.float16
    for name, value in ref.items():
        assert_close(name, out[name], value, low[name], 2)


def masks(m: int, f: int, d: int, p: float, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout factors of hidden units and output, found by passing values that show them."""
    x = torch.zeros(1, m, d, device=DEVICE)
    # hidden units all silu(b1) = 1; the down-projection copies unit i to output i % d
    one = torch.tensor(1.2784645427610738, device=DEVICE)
    w1, b1 = torch.zeros(f, d, device=DEVICE), one.expand(f)
    zero_w2 = torch.zeros(d, f, device=DEVICE)
    norm = torch.ones(d, device=DEVICE), torch.zeros(d, device=DEVICE)
    # only b2 reaches the output: the factors of the output
    args = (x, *norm, w1, b1, zero_w2, torch.ones(d, device=DEVICE), seed, 1.0, p, EPS, True)
    output = kernels.forward(*args)[0][0]
    # the gradient of w2 for a single one in dout is g of that row, times the factor of that output
    hidden = torch.zeros(m, f, device=DEVICE)
    saved = kernels.forward(*args)[1:]
    for row in range(m):
        column = int(output[row].ne(0).nonzero()[0])
        dout = torch.zeros(1, m, d, device=DEVICE)
        dout[0, row, column] = 1.0
        dw2 = kernels.backward(dout, *args[:6], *saved, seed, 1.0, p)[4]
        hidden[row] = dw2[column] / output[row, column]
    return hidden.round(decimals=4), output.round(decimals=4)


def test_dropout(assert_close):
    """The share of dropped elements, their scale, two independent masks, and the same ones in the backward."""
    p, m, f, d = 0.25, 17, 300, 136
    seed = torch.tensor([-(2**62) + 12345], device=DEVICE)
    hidden, output = masks(m, f, d, p, seed)
    for factor in (hidden, output):
        kept = factor != 0
        assert factor[kept].sub(dropout_scale(p)).abs().max() < 1e-3
        # five standard deviations
        assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    agreement = (hidden[:, :d].ne(0) == output.ne(0)).float().mean().item()
    expected = (1 - p) ** 2 + p**2
    assert abs(agreement - expected) < 5 * (expected * (1 - expected) / output.numel()) ** 0.5
    keep = [torch.where(factor != 0, dropout_scale(p), 0.0) for factor in (hidden, output)]
    tensors, dout = make_inputs((1, m, d), f, torch.float32)
    check(assert_close, tensors, dout, keep=keep, seed=seed, dropout_p=p)


def test_the_same_bits_every_run():
    tensors, dout = make_inputs((1, 33, 24), 40, torch.float32)
    first = run(tensors, dout)
    for _ in range(30 if DEVICE == "cuda" else 1):
        again = run(tensors, dout)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_empty(shape):
    tensors, dout = make_inputs(shape, 32, torch.float32)
    out = run(tensors, dout)
    assert out["out"].shape == shape
    assert all((out["d" + name] == 0).all() for name in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "f"), [((8, 400, 256), 1024), ((3, 127, 512), 2048), ((2, 65, 144), 576)])
def test_on_the_gpu(assert_close, shape, f, dtype):
    check(assert_close, *make_inputs(shape, f, dtype))
