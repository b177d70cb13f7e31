"""residual_layer_norm on the C++ kernels: every SIMD level, odd widths, dropout, gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcconformer import ops
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.residual_layer_norm import residual_layer_norm_reference

from .cpu_kernels import LEVELS, kernels, run
from .dropout import keep_factor

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(*shape: int) -> list[Tensor]:
    x, y = torch.randn(2, *shape, dtype=torch.float64) + 0.5
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64)
    return [x, y, weight, bias]


def check(assert_close, inputs, dtype=torch.float32, layout="dense", level=None, mask=None, **options) -> None:
    grads = list(torch.randn(2, *inputs[0].shape, dtype=torch.float64))
    inputs, grads = ([x.to(dtype).double() for x in xs] for xs in (inputs, grads))
    alpha = options.get("alpha", 1.0)

    def reference(x, y, weight, bias):
        return residual_layer_norm_reference(x, y if mask is None else y * mask.to(y.dtype), weight, bias, alpha=alpha)

    with kernels(level):
        out, gradients = run(lambda *x: ops.residual_layer_norm(*x, **options), inputs, grads, dtype, layout)
    low, low_gradients = run(reference, inputs, grads, dtype)
    ref, ref_gradients = run(reference, inputs, grads, torch.float64)
    for name, o, ref_o, low_o in zip("sn", out, ref, low):
        assert_close(name, o, ref_o, low_o, 2)
    for i, (g, ref_g, low_g) in enumerate(zip(gradients, ref_gradients, low_gradients)):
        assert_close(f"gradient {i}", g, ref_g, low_g, 3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [1, 7, 16, 65, 256, 1030])
def test_widths(assert_close, level, d):
    check(assert_close, make_inputs(2, 67, d), level=level, alpha=0.5)


@pytest.mark.parametrize("shape", [(5,), (130, 9), (2, 3, 4, 24), (0, 8)])
def test_any_number_of_dimensions(assert_close, shape):
    if 0 in shape:
        with kernels():
            s, n = ops.residual_layer_norm(*(x.float() for x in make_inputs(*shape)))
        assert s.shape == n.shape == shape
        return
    check(assert_close, make_inputs(*shape))


@pytest.mark.parametrize("layout", ["strided", "scattered"])
def test_layouts(assert_close, layout):
    check(assert_close, make_inputs(2, 33, 20), layout=layout, alpha=0.5)


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16(assert_close, level):
    check(assert_close, make_inputs(2, 33, 72), torch.bfloat16, level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [20, 300])
def test_dropout_is_that_of_the_counters(assert_close, level, d):
    torch.manual_seed(1)
    inputs = make_inputs(70, d)
    state = torch.get_rng_state()
    torch.randn(2, 70, d, dtype=torch.float64)  # the incoming gradients of check
    seed = dropout_seed(inputs[0], 0.25)
    torch.set_rng_state(state)
    mask = keep_factor(int(seed), 0.25, 70, d)
    check(assert_close, inputs, level=level, mask=mask, dropout_p=0.25, alpha=0.5)


def test_same_bits_for_any_number_of_threads():
    inputs, grads = make_inputs(203, 24), list(torch.randn(2, 203, 24))
    results = []
    for threads in (1, 2, 5):
        with kernels(threads=threads):
            out, gradients = run(lambda *x: ops.residual_layer_norm(*x, alpha=0.5), inputs, grads, torch.float32)
        results.append([*out, *gradients])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
