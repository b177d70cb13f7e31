"""The products of the inference chain in Triton's interpreter against float64, and what it takes them to hide."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import chain_products as products
from lcconformer.kernels import common

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="kernels are compiled here")

EPS = 1e-5
ACTIVATIONS = {"none": lambda u: u, "silu": F.silu, "glu": lambda u: F.glu(u, -1)}
# rows, inputs, outputs
SHAPES = [(1, 16, 24), (7, 144, 40), (35, 24, 16)]


def norm_product(x, norm, weight, bias, epilogue, previous):
    entered = x if previous is None else F.layer_norm(x, x.shape[1:], *previous, EPS)
    u = F.linear(F.layer_norm(entered, x.shape[1:], *norm, EPS), weight, bias)
    return ACTIVATIONS[epilogue](u), entered


def wider(*tensors):
    return [
        None if t is None else tuple(v.double() for v in t) if isinstance(t, tuple) else t.double() for t in tensors
    ]


def check_norm_product(assert_close, shape, dtype, epilogue, two, bias):
    # eager PyTorch's error in one row is a matter of luck; in those of eight calls it is not
    calls = [_norm_product(shape, dtype, epilogue, two, bias) for _ in range(8 if shape[0] == 1 else 1)]
    out, entered, low, ref = (
        torch.cat(tensors) for tensors in zip(*((o, e, low[0], ref[0]) for o, e, low, ref in calls))
    )
    assert_close("out", out, ref, low, 2.0)
    if two:
        low, ref = (torch.cat([call[i][1] for call in calls]) for i in (2, 3))
        assert_close("entered", entered, ref, low, 2.0)


def _norm_product(shape, dtype, epilogue, two, bias):
    m, k, n = shape
    rows = 2 * n if epilogue == "glu" else n

    def make(*size):
        return torch.randn(size).to(dtype)

    x, norm, previous = make(m, k) + 1, (make(k), make(k)), (make(k), make(k)) if two else None
    # columns apart, and as nn.Linear never has them: every stride counts
    weight, bias = make(rows, 2 * k)[:, ::2] / 8, make(rows) if bias else None
    out, entered = torch.full((m, n), torch.nan, dtype=dtype), torch.full((m, k), torch.nan, dtype=dtype)
    given = {"previous": previous, "entered": entered} if two else {}
    products.norm_product(x, norm, weight, bias, out, EPS, epilogue=epilogue, **given)
    low = norm_product(x, norm, weight, bias, epilogue, previous)
    double = wider(x, norm, weight, bias, previous)
    ref = norm_product(*double[:4], epilogue, double[4])
    return out, entered, low, ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("epilogue", "two"), [("none", False), ("silu", True), ("glu", False)])
def test_norm_product(epilogue, two, shape, dtype, assert_close):
    check_norm_product(assert_close, shape, dtype, epilogue, two, shape[0] != 7)


@pytest.mark.parametrize("epilogue", ["silu", "glu"])
@pytest.mark.parametrize("programs", [1, 2])
def test_several_tiles_of_columns_a_program(programs, epilogue, monkeypatch, assert_close):
    monkeypatch.setattr(products, "FEW", 3)
    monkeypatch.setattr(products, "_PROGRAMS", programs)
    check_norm_product(assert_close, (9, 16, 104), torch.float16, epilogue, epilogue == "silu", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 16, 24), (35, 200, 40)], ids=str)
def test_residual_product(shape, dtype, assert_close):
    m, k, n = shape
    a, weight, bias, residual = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))

    def reference(a, weight, bias, residual):
        return residual + 0.5 * F.linear(a, weight, bias)

    low, ref = reference(a, weight, bias, residual), reference(*wider(a, weight, bias, residual))
    out = residual.clone()
    products.residual_product(a, weight, bias, out, out, 0.5)
    assert_close("in place", out, ref, low, 2.0)
    products.residual_product(a, weight, None, residual, out)
    low, ref = residual + F.linear(a, weight), residual.double() + F.linear(a.double(), weight.double())
    assert_close("without a bias", out, ref, low, 2.0)


@pytest.mark.parametrize("shape", [(1, 16), (9, 144)], ids=str)
def test_norm(shape, assert_close):
    x, weight, bias = torch.randn(shape) + 1, torch.randn(shape[1]), torch.randn(shape[1])
    out = torch.full_like(x, torch.nan)
    products.norm(x, weight, bias, out, EPS)
    ref = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), EPS)
    assert_close("norm", out, ref, F.layer_norm(x, shape[1:], weight, bias, EPS), 2.0)


def test_rows_as_tiles():
    expected = {16: (16, 1), 24: (32, 1), 64: (64, 1), 144: (64, 3), 256: (256, 1), 384: (128, 3), 512: (256, 2)}
    assert {width: products.row_chunks(width) for width in expected} == expected


EARLY = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lcconformer.kernels import chain_convolution, chain_products
from lcconformer.kernels.common import divisible_by_16

def order(module, name):
    config = next(c for c in module.aot_configs(90) if c.name.endswith(name))
    names = config.kernel.arg_names
    signature = {n: config.signature.get(n, "constexpr") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16(config)}
    source = ASTSource(config.kernel, signature, dict(config.constexprs), attributes)
    options = {k: v for k, v in config.launch.kwargs().items() if k not in config.launch.blocks}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.launch_pdl
    ptx = compiled.asm["ptx"]
    ahead, waited, rest = ptx.partition("griddepcontrol.wait")
    started = rest.index("griddepcontrol.launch_dependents")
    assert waited and "ld.global" in ahead and "st.global" not in ahead and "cp.async" not in ahead
    assert not re.search("global|cp.async", rest[:started])
    assert "ld.global" in rest and "st.global" in rest

order(chain_products, "norm_product silu of two norms K=256 M=128")
order(chain_products, "residual_product K=1024 M=128")
order(chain_convolution, "depthwise none C=256 M=128")
"""


def test_compiled_kernels_load_weights_then_wait_then_let_the_next_start():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", EARLY], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
