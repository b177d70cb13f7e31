"""feed_forward on the C++ kernels: every SIMD level, odd widths, dropout, gradients against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer import ops
from lcconformer.ops import gemm
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.feed_forward import cpu as feed_forward

from .cpu_kernels import ACTIVATIONS, LEVELS, kernels, run
from .dropout import keep_factor

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(b: int, t: int, d: int, f: int) -> list[Tensor]:
    shapes = [(b, t, d), (d,), (d,), (f, d), (f,), (d, f), (d,)]
    x, gamma, beta, w1, b1, w2, b2 = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return [x, 1 + 0.3 * gamma, beta, w1 / d**0.5, b1, w2 / f**0.5, b2]


def reference(x, gamma, beta, w1, b1, w2, b2, hidden=1.0, output=1.0, activation="silu"):
    """With dropout given as factors of the hidden layer and of the output."""
    h = F.layer_norm(x, x.shape[-1:], gamma, beta)
    hidden, output = (m.to(x.dtype) if isinstance(m, Tensor) else m for m in (hidden, output))
    return x + 0.5 * (F.linear(ACTIVATIONS[activation](F.linear(h, w1, b1)) * hidden, w2, b2) * output)


def check(
    assert_close, inputs, dtype=torch.float32, layout="dense", level=None, masks=(1.0, 1.0), p=0.0, activation="silu"
) -> None:
    dout = [torch.randn(inputs[0].shape, dtype=torch.float64)]
    inputs, dout = ([x.to(dtype).double() for x in xs] for xs in (inputs, dout))
    with kernels(level):
        out, grads = run(
            lambda *x: ops.feed_forward(*x, dropout_p=p, activation=activation), inputs, dout, dtype, layout
        )
    low, low_grads = run(lambda *x: reference(*x, *masks, activation), inputs, dout, dtype)
    ref, ref_grads = run(lambda *x: reference(*x, *masks, activation), inputs, dout, torch.float64)
    assert_close("out", out[0], ref[0], low[0], 2)
    for i, (g, ref_g, low_g) in enumerate(zip(grads, ref_grads, low_grads)):
        assert_close(f"gradient {i}", g, ref_g, low_g, 3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("d", "f"), [(1, 1), (7, 30), (65, 129), (64, 1100)])
def test_widths(assert_close, level, d, f):
    """1,100 columns are two blocks of dropout counters."""
    check(assert_close, make_inputs(3, 45, d, f), level=level)


@pytest.mark.parametrize("layout", ["strided", "scattered"])
def test_layouts(assert_close, layout):
    check(assert_close, make_inputs(2, 20, 12, 40), layout=layout)


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16(assert_close, level):
    check(assert_close, make_inputs(2, 33, 40, 72), torch.bfloat16, level=level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations(assert_close, activation, level, dtype):
    check(assert_close, make_inputs(3, 45, 33, 130), dtype, level=level, activation=activation)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_size(assert_close, level, name):
    """Where the tails of gelu are, at zero of either sign, and what is not finite."""
    act = ACTIVATIONS[name]
    sizes = torch.cat((torch.linspace(0, 15, 40_001), torch.logspace(-40, 30, 2_000)))
    u = torch.cat((sizes, -sizes, torch.tensor([torch.nan, torch.inf, -torch.inf])))[None]
    exact, eager = u.double().requires_grad_(), u.clone().requires_grad_()
    outs = [act(exact), act(eager)]
    slopes = [torch.autograd.grad(out.sum(), x)[0] for out, x in zip(outs, (exact, eager))]
    with kernels(level):
        out = feed_forward.activation(u, None, None, 0.0, name)
        du, again, _ = feed_forward.activation_backward(torch.ones_like(u), u, None, None, 0.0, name)
    assert torch.equal(out.nan_to_num(), again.nan_to_num())
    finite = outs[0].isfinite() & slopes[0].isfinite()
    # torch has NaN at infinity where a limit is known: 0 * inf
    known = u.isfinite() | u.isnan()
    assert torch.equal(finite & known, u.isfinite())
    for got, low in ((out, outs[1]), (du, slopes[1])):
        assert torch.equal(got.isnan() & known, low.isnan() & known)
    small = u.abs() < 16  # the larger ones would hide the errors of the others
    for part in (finite & small, finite & ~small & known):
        assert_close("out", out[part], outs[0].detach()[part], outs[1].detach()[part], 2)
        assert_close("slope", du[part], slopes[0][part], slopes[1][part], 3)


@pytest.mark.parametrize("level", LEVELS)
def test_dropout_is_that_of_the_counters(assert_close, level):
    d, f, p = 20, 1100, 0.25
    torch.manual_seed(1)
    inputs = make_inputs(2, 35, d, f)
    state = torch.get_rng_state()
    torch.randn(2, 35, d, dtype=torch.float64)  # the incoming gradient of check
    seed = int(dropout_seed(inputs[0], p))
    torch.set_rng_state(state)
    masks = [keep_factor(seed, p, 70, n, stream=stream).view(2, 35, n) for stream, n in enumerate((f, d))]
    check(assert_close, inputs, level=level, masks=masks, p=p)


def test_same_bits_for_any_number_of_threads():
    """Of what the kernels sum: biases and norm. The library's products make no such promise."""
    inputs, dout = make_inputs(3, 70, 16, 40), [torch.randn(3, 70, 16)]
    results = []
    for threads in (1, 2, 5):
        with kernels(threads=threads):
            _, grads = run(ops.feed_forward, inputs, dout, torch.float32)
        results.append(grads[6])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("mkl", "there"), [(False, True), (False, False), (True, True)])
def test_products_of_either_library(mkl, there, assert_close, monkeypatch):
    if there and not gemm._onednn():
        pytest.skip("this PyTorch has no oneDNN")
    called = []
    monkeypatch.setattr(gemm, "_mkl_leads", lambda: mkl)
    monkeypatch.setattr(gemm, "_onednn", lambda: there)
    own = gemm.F.linear
    ours = SimpleNamespace(linear=lambda *args: (called.append(args), own(*args))[1])
    monkeypatch.setattr(gemm, "F", ours)
    check(assert_close, make_inputs(2, 9, 8, 24))
    assert bool(called) == (mkl or not there)


@pytest.mark.parametrize("rows", [100, 300])
@pytest.mark.parametrize(("n", "k"), [(24, 8), (8, 24), (16, 16)])
def test_gradient_of_a_weight(rows, n, k, monkeypatch):
    """Of few rows it is laid out as the weight is: autograd would copy it otherwise."""
    if not gemm._onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(gemm, "_mkl_leads", lambda: False)
    dy, x = torch.randn(rows, n), torch.randn(rows, k)
    got = gemm.weight_gradient(dy, x)
    torch.testing.assert_close(got.double(), dy.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
    assert got.is_contiguous() == (rows == 100 or n < k)


@pytest.mark.parametrize(
    ("avx512", "read", "expected"),
    [
        (True, "vendor_id : GenuineIntel\n", True),
        (True, "vendor_id : AuthenticAMD\n", False),
        (True, None, False),
        (False, "vendor_id : AuthenticAMD\n", True),
    ],
)
def test_the_processor(avx512, read, expected, monkeypatch):
    def read_text(path, **_options):
        if read is None:
            raise FileNotFoundError(path)
        return read

    monkeypatch.setattr(gemm.Path, "read_text", read_text)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    assert gemm._mkl_leads.__wrapped__() == expected


def test_onednn_is_found_by_trying_it(monkeypatch):
    class Mkldnn:
        def __getattr__(self, name):
            raise AttributeError(name)

    gemm._onednn.cache_clear()
    try:
        assert isinstance(gemm._onednn(), bool)
        gemm._onednn.cache_clear()
        monkeypatch.setattr(torch.ops, "mkldnn", Mkldnn())
        assert not gemm._onednn()
    finally:
        monkeypatch.undo()
        gemm._onednn.cache_clear()
