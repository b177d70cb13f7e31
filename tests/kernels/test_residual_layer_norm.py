"""The Triton kernels of residual_layer_norm, interpreted on the CPU or compiled on a GPU, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import residual_layer_norm as kernels
from lcconformer.kernels.common import dropout_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
ALPHA = 0.5
pytestmark = pytest.mark.usefixtures("poisoned")


def run(x, y, weight, bias, ds, dn, seed=None, dropout_p=0.0, alpha=ALPHA):
    s, n, mean, rstd = kernels.forward(x, y, weight, bias, seed, alpha, dropout_p, EPS)
    dx, dy, dparams = kernels.backward(ds, dn, s, mean, rstd, weight, seed, alpha, dropout_p)
    return {"s": s, "n": n, "dx": dx, "dy": dy if dy.numel() else dx, "dweight": dparams[0], "dbias": dparams[1]}


def eager(x, y, weight, bias, ds, dn, dtype, keep=None, alpha=ALPHA):
    """The same from PyTorch's operators; ``keep`` is the factor that dropout gives each element of y."""
    x, y, weight, bias = leaves = [p.to(dtype, copy=True).requires_grad_() for p in (x, y, weight, bias)]
    s = x + alpha * (y if keep is None else y * keep.to(dtype))
    n = F.layer_norm(s, s.shape[-1:], weight, bias, EPS)
    torch.autograd.backward((s, n), (ds.to(dtype), dn.to(dtype)))
    named = zip(("dx", "dy", "dweight", "dbias"), (p.grad for p in leaves))
    return {"s": s.detach(), "n": n.detach(), **dict(named)}


def make_inputs(shape, dtype, scale=1.0):
    d = shape[-1]
    tensors = (scale + torch.randn(shape), torch.randn(shape), 0.5 + torch.rand(d), torch.randn(d))
    gradients = (torch.randn(shape), torch.randn(shape))
    return [p.to(DEVICE, dtype) for p in (*tensors, *gradients)]


def check(assert_close, args, keep=None, **kwargs):
    out = run(*args, **kwargs)
    alpha = kwargs.get("alpha", ALPHA)
    ref = eager(*args, torch.float64, keep, alpha)
    low = eager(*args, args[0].dtype, keep, alpha)
    for name, value in out.items():
        # a sum over rows rounds like its terms
        scale = (
            args[-1].shape[:-1].numel() ** 0.5 * args[-1].abs().max().item() if name in ("dweight", "dbias") else 0.0
        )
        assert_close(name, value, ref[name], low[name], 3 if name.startswith("d") else 2, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 7, 24), (3, 1), (1, 127, 70), (1, 5, 2049)])
def test_equals_the_oracle(assert_close, shape, dtype):
    check(assert_close, make_inputs(shape, dtype))


def test_mean_far_from_zero(assert_close):
    """The variance is that of centred values: nothing cancels."""
    check(assert_close, make_inputs((4, 64), torch.float32, scale=1000.0))


def test_programs_of_several_row_blocks(assert_close):
    """2048 wide rows: more than 512 of them, so that a backward program walks more than one block."""
    check(assert_close, make_inputs((520, 2040), torch.float32))


def test_plain_addition_needs_no_second_gradient(assert_close):
    args = make_inputs((3, 5, 24), torch.float32)
    check(assert_close, args, alpha=1.0)
    s, _n, mean, rstd = kernels.forward(*args[:4], None, 1.0, 0.0, EPS)
    assert kernels.backward(*args[4:], s, mean, rstd, args[2], None, 1.0, 0.0)[1].numel() == 0


def test_strides(assert_close):
    x, y, _weight, _bias, _ds, dn = make_inputs((4, 6, 24), torch.float32)
    weight, bias = torch.randn(24, 2, device=DEVICE).unbind(1)
    wide = torch.randn(4, 6, 48, device=DEVICE)
    ones = torch.ones((), device=DEVICE).expand(4, 6, 24)
    check(
        assert_close,
        [x.transpose(0, 1), wide.transpose(0, 1)[..., ::2], weight, bias, ones.transpose(0, 1), dn.view(6, 4, 24)],
    )
    check(assert_close, [wide[..., :24], wide[..., 24:], weight, bias, dn, ones])
    check(assert_close, [y, x, weight, bias, wide[..., 1:25], wide[..., 24:]])


def test_dropout(assert_close):
    """The share of dropped elements, their scale, and the same ones in the backward."""
    p, shape = 0.3, (64, 250)
    args = make_inputs(shape, torch.float32)
    seed = torch.tensor([1234567890123], device=DEVICE)
    ones, zeros = torch.ones(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
    factor = run(zeros, ones, *args[2:], seed=seed, dropout_p=p, alpha=1.0)["s"]
    kept = factor != 0
    assert factor[kept].sub(dropout_scale(p)).abs().max() < 1e-6
    # five standard deviations of a mean over 16000 draws
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    rows, columns = kept.float().mean(1), kept.float().mean(0)
    assert (rows - (1 - p)).abs().max() < 5 * (p * (1 - p) / 250) ** 0.5
    assert (columns - (1 - p)).abs().max() < 5 * (p * (1 - p) / 64) ** 0.5
    check(assert_close, args, keep=factor, seed=seed, dropout_p=p)
    other = run(zeros, ones, *args[2:], seed=seed + 1, dropout_p=p, alpha=1.0)["s"]
    assert not torch.equal(other, factor)


def test_the_same_bits_every_run():
    args = make_inputs((33, 70), torch.float32)
    first = run(*args)
    for _ in range(30 if DEVICE == "cuda" else 1):
        again = run(*args)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_empty(shape):
    out = run(*make_inputs(shape, torch.float32))
    assert out["s"].shape == out["dx"].shape == shape
    assert (out["dweight"] == 0).all()
    assert (out["dbias"] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 400, 256), (3, 127, 512), (2, 65, 768), (1, 7, 8192), (5000, 70)])
def test_on_the_gpu(assert_close, shape, dtype):
    check(assert_close, make_inputs(shape, dtype))
