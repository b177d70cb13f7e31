"""The feed-forward's products with the steps around them inside, interpreted or on a GPU, against float64 oracles."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import feed_forward as kernels
from lcconformer.kernels import feed_forward_products as products
from lcconformer.kernels import tuning
from lcconformer.kernels.common import LaunchConfig

from . import test_feed_forward as whole

DEVICE = whole.DEVICE
EPS = 1e-5
pytestmark = pytest.mark.usefixtures("poisoned")
# M, D, F: less than a tile, a little more than one, several
SHAPES = [(1, 16, 64), (7, 24, 150), (65, 70, 33), (203, 144, 96)]


def make(m, d, f, dtype, x_dtype=None):
    x, w1, w2 = torch.randn(m, d), torch.randn(f, d) / d**0.5, torch.randn(d, f) / f**0.5
    vectors = {"b1": torch.randn(f), "b2": torch.randn(d), "weight": 0.5 + torch.rand(d), "bias": torch.randn(d)}
    given = {n: t.to(DEVICE, dtype) for n, t in {"w1": w1, "w2": w2, **vectors}.items()}
    wide = torch.full((m, d + 3), float("nan"), device=DEVICE, dtype=x_dtype or dtype)
    return {"x": wide[:, :d].copy_(x), **given}  # its rows lie apart


def each(product):
    return pytest.mark.parametrize(
        "config", products.CONFIGS[product], ids=lambda c: "x".join(map(str, c.blocks.values()))
    )


def tolerance_rule(assert_close, call, found, given):
    """``call`` of the inputs in float64 is the oracle, of the inputs as they are what eager PyTorch gives."""
    ref, low = (call({n: t.to(dtype or t.dtype) for n, t in given.items()}) for dtype in (torch.float64, None))
    for name, value in ref.items():
        assert_close(name, found[name], value, low[name].to(found[name].dtype), 3 if name[0] == "d" else 2)


@each("up")
@pytest.mark.parametrize("shape", SHAPES)
def test_up(assert_close, shape, config):
    given = make(*shape, torch.float16)
    g, u, mean, rstd = products.up(given["x"], None, given["w1"], given["b1"], None, 0.0, config, save=True)
    assert mean is None
    assert rstd is None

    def eager(t):
        u = F.linear(t["x"], t["w1"])
        return {"u": u, "g": F.silu(u + t["b1"])}

    tolerance_rule(assert_close, eager, {"u": u, "g": g}, given)


@each("norm_up")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_layer_norm_inside(assert_close, shape, x_dtype, config):
    given = make(*shape, torch.float16, x_dtype)
    norm = (given["weight"], given["bias"], EPS)
    g, u, mean, rstd = products.up(given["x"], norm, given["w1"], given["b1"], None, 0.0, config, save=True)

    def eager(t):
        n = F.layer_norm(t["x"].to(t["weight"].dtype), t["x"].shape[-1:], t["weight"], t["bias"], EPS)
        u = F.linear(n, t["w1"])
        wide = t["x"].to(torch.promote_types(t["x"].dtype, torch.float32))
        return {
            "u": u, "g": F.silu(u + t["b1"]), "mean": wide.mean(1), "rstd": (wide.var(1, correction=0) + EPS).rsqrt()
        }  # fmt: skip

    tolerance_rule(assert_close, eager, {"u": u, "g": g, "mean": mean, "rstd": rstd}, given)


@each("norm_up")
def test_statistics_of_rows_far_from_zero(config):
    """A variance as the difference of two large sums would be lost."""
    x = 1000 + torch.randn(9, 300, device=DEVICE)
    one, zero = torch.ones(300, device=DEVICE), torch.zeros(300, device=DEVICE)
    w1 = torch.randn(40, 300, device=DEVICE).half()
    _, _, mean, rstd = products.up(x, (one, zero, EPS), w1, None, None, 0.0, config, save=True)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (x.double().var(1, correction=0) + EPS).rsqrt(), rtol=1e-4, atol=0)


@each("down")
@pytest.mark.parametrize("shape", SHAPES)
def test_down(assert_close, shape, config):
    given = make(*shape, torch.float16)
    given["g"] = torch.randn(shape[0], shape[2]).half().to(DEVICE)
    out = products.down(given["g"], given["w2"], given["b2"], given["x"], None, 0.5, 0.0, config)

    def eager(t):
        return {"out": t["x"] + 0.5 * F.linear(t["g"], t["w2"], t["b2"])}

    tolerance_rule(assert_close, eager, {"out": out}, given)


@each("up_backward")
@pytest.mark.parametrize("shape", SHAPES)
def test_up_backward(assert_close, shape, config):
    m, d, f = shape
    given = make(m, d, f, torch.float16)
    given["u"], given["dz"] = torch.randn(m, f).half().to(DEVICE), torch.randn(m, d + 3).half().to(DEVICE)[:, :d]
    du, g, part = products.up_backward(given["dz"], given["w2"], given["u"], given["b1"], None, 0.0, config)

    def eager(t):
        u, b1 = t["u"].detach().requires_grad_(), t["b1"].detach().requires_grad_()
        g = F.silu(u + b1)
        F.linear(g, t["w2"]).backward(t["dz"])
        return {"du": u.grad, "g": g.detach(), "db1": b1.grad}

    tolerance_rule(assert_close, eager, {"du": du, "g": g, "db1": part.sum(0)}, given)


@pytest.mark.parametrize("index", range(len(products.CONFIGS["up_backward"])))
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_the_op_by_products(assert_close, monkeypatch, index, dropout_p):
    """Forward and backward of the whole op; dropout draws what the pointwise kernels draw."""
    seed = torch.tensor([-(2**62) + 99], device=DEVICE) if dropout_p else None
    tensors, dout = whole.make_inputs((2, 37, 40), 136, torch.float16)
    # the products multiply what stands in memory, whatever its strides
    tensors[3], tensors[5] = tensors[3].t().contiguous().t(), torch.cat([tensors[5]] * 2, 1)[:, :136]
    by_library = whole.run(tensors, dout, seed, dropout_p)
    wide = whole.run([t.float() for t in tensors], dout.float(), seed, dropout_p)
    ref = {n: t.double() for n, t in wide.items()} if seed is not None else whole.eager(tensors, dout, torch.float64)
    monkeypatch.setattr(products, "choice", lambda product, *_: products.CONFIGS[product][index])
    called = []
    for kernel in ("up", "down", "up_backward"):
        plain = getattr(products, kernel)
        monkeypatch.setattr(
            products, kernel, lambda *a, _k=kernel, _f=plain, **kw: (called.append(_k), _f(*a, **kw))[1]
        )
    by_products = whole.run(tensors, dout, seed, dropout_p)
    assert called == ["up", "down", "up_backward"]
    again = whole.run(tensors, dout, seed, dropout_p)
    for name, value in ref.items():
        assert torch.equal(by_products[name], again[name]), name
        assert_close(name, by_products[name], value, by_library[name], 3, dout.abs().max().item() * 74**0.5)


def test_nothing_is_kept_for_inference(monkeypatch):
    tensors, _ = whole.make_inputs((2, 7, 24), 40, torch.float16)
    kept = kernels.forward(*tensors, None, 0.5, 0.0, EPS, True)
    for config in (products.LIBRARY, products.CONFIGS["up"][-1]):
        monkeypatch.setattr(products, "choice", lambda *_, _config=config: _config)
        out, *saved = kernels.forward(*tensors, None, 0.5, 0.0, EPS, False)
        assert [t.numel() for t in saved] == [0, 0, 0]
        torch.testing.assert_close(out, kept[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("product", products.CONFIGS)
def test_no_rows(product):
    given, config = make(0, 24, 40, torch.float16), products.CONFIGS[product][0]
    x, w1, w2 = given["x"], given["w1"], given["w2"]
    if product == "down":
        assert products.down(x.new_empty(0, 40), w2, None, x, None, 0.5, 0.0, config).shape == (0, 24)
    elif product == "up_backward":
        du, g, part = products.up_backward(x, w2, x.new_empty(0, 40), None, None, 0.0, config)
        assert du.shape == g.shape == part.shape == (0, 40)
    else:
        assert products.up(x, None, w1, None, None, 0.0, config, save=True)[0].shape == (0, 40)


def test_the_library_is_chosen_until_a_file_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCONFORMER_TUNED", str(tmp_path))
    monkeypatch.setattr(tuning, "_gpu", lambda index: "some GPU")
    tuning._table.cache_clear()

    def rows(m, dtype=torch.bfloat16):
        return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(m, 256))

    weight = torch.empty(1024, 256, dtype=torch.bfloat16)
    assert products.choice("up", rows(3200), weight, 1024) == products.LIBRARY
    best = products.CONFIGS["up"][1]
    other = LaunchConfig(4, 3, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})
    key = "feed_forward.{} bfloat16 M<=4096 N=1024 K=256"
    tuning.write(tuning.file_of("some GPU"), "some GPU", {key.format("up"): best, key.format("down"): other})
    assert products.choice("up", rows(3200), weight, 1024) == best
    assert products.choice("up", rows(4096), weight, 1024) == best
    assert products.choice("up", rows(4097), weight, 1024) == products.LIBRARY
    assert products.choice("up", rows(3200), weight, 2048) == products.LIBRARY
    assert products.choice("up", rows(3200), weight.float(), 1024) == products.LIBRARY
    # what no file may ask for
    assert products.choice("down", rows(3200), weight, 1024) == products.LIBRARY
    tuning._table.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(products.CONFIGS["up_backward"])))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "f"), [((8, 400, 256), 1024), ((3, 127, 512), 2048), ((1, 100, 144), 576)])
def test_on_the_gpu(assert_close, monkeypatch, shape, f, dtype, index):
    monkeypatch.setattr(products, "choice", lambda product, *_: products.CONFIGS[product][index])
    whole.check(assert_close, *whole.make_inputs(shape, f, dtype))
