"""glu_depthwise_conv on the C++ kernels: every SIMD level, norm, odd shapes, gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcconformer import ops
from lcconformer.ops.glu_depthwise_conv import glu_depthwise_conv_reference

from .cpu_kernels import FRAMES, LEVELS, kernels, run

pytestmark = pytest.mark.usefixtures("poisoned")

NORMS = ["none", "layer", "batch", "batch in training", "group"]


def make_inputs(b: int, t: int, c: int, k: int) -> list[Tensor]:
    shapes = [(b, t, 2 * c), (c, k), (c,), (c,), (c,)]
    x, weight, bias, gamma, beta = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return [x, weight / k**0.5, bias, 1 + 0.3 * gamma, beta]


def call(op, norm: str, groups: int = 1, lengths: Tensor | None = None, activation: str = "silu"):
    """The op as a function of its differentiable inputs; running statistics are left in ``f.running``."""

    def f(x, weight, bias, norm_weight=None, norm_bias=None):
        c = weight.shape[0]
        mean, var = torch.linspace(-1, 1, c, dtype=x.dtype), torch.linspace(0.5, 2, c, dtype=x.dtype)
        f.running = [mean, var]
        return op(
            x, weight, bias, lengths=lengths, norm=norm.split()[0], norm_weight=norm_weight, norm_bias=norm_bias,
            running_mean=mean, running_var=var, num_groups=groups, training="training" in norm, activation=activation,
        )  # fmt: skip

    return f


def check(assert_close, inputs, norm, dtype=torch.float32, layout="dense", level=None, **options) -> None:
    if norm == "none":
        inputs = inputs[:3]
    b, t, c = *inputs[0].shape[:2], inputs[1].shape[0]
    dout = [torch.randn(b, t, c, dtype=torch.float64)]
    inputs, dout = ([x.to(dtype).double() for x in xs] for xs in (inputs, dout))
    ours = call(ops.glu_depthwise_conv, norm, **options)
    theirs = call(glu_depthwise_conv_reference, norm, **options)
    with kernels(level):
        out, grads = run(ours, inputs, dout, dtype, layout)
        with torch.no_grad():
            assert torch.equal(ours(*(x.to(dtype) for x in inputs)), out[0])
    low, low_grads = run(theirs, inputs, dout, dtype)
    low_running = theirs.running
    ref, ref_grads = run(theirs, inputs, dout, torch.float64)
    assert_close("out", out[0], ref[0], low[0], 2)
    # a sum over frames rounds like its terms: incoming gradients, or behind a norm those of the input and the taps
    terms = max((b * t) ** 0.5 * float(dout[0].abs().max()), *(float(g.abs().max()) for g in ref_grads[:2]))
    for i, (g, ref_g, low_g) in enumerate(zip(grads, ref_grads, low_grads)):
        assert_close(f"gradient {i}", g, ref_g, low_g, 3, terms if i else 0.0)
    for name, mine, ref_r, low_r in zip(("mean", "var"), ours.running, theirs.running, low_running):
        assert_close(name, mine, ref_r, low_r, 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("t", FRAMES)
def test_odd_lengths(assert_close, level, norm, t):
    lengths = torch.tensor([t, max(t // 2, 1), 0])
    check(assert_close, make_inputs(3, t, 21, 31), norm, level=level, groups=3, lengths=lengths)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [1, 3, 31, 63])
def test_kernel_widths(assert_close, level, k):
    check(assert_close, make_inputs(1, 100, 16, k), "layer", level=level)


@pytest.mark.parametrize("norm", NORMS)
# at the kink of relu the rounding of bfloat16 decides the slope
@pytest.mark.parametrize(
    ("activation", "dtype"), [("gelu", torch.float32), ("gelu", torch.bfloat16), ("relu", torch.float32)], ids=str
)
def test_activations(assert_close, activation, norm, dtype):
    options = {"groups": 3, "lengths": torch.tensor([203, 60]), "activation": activation}
    for level in LEVELS:
        check(assert_close, make_inputs(2, 203, 21, 31), norm, dtype, level=level, **options)


@pytest.mark.parametrize("c", [1, 5, 16, 33, 256])
@pytest.mark.parametrize("norm", NORMS)
def test_channels(assert_close, c, norm):
    check(assert_close, make_inputs(2, 40, c, 7), norm, lengths=torch.tensor([40, 13]))


@pytest.mark.parametrize("layout", ["strided", "scattered"])
@pytest.mark.parametrize("norm", NORMS)
def test_layouts(assert_close, layout, norm):
    check(assert_close, make_inputs(2, 50, 18, 5), norm, layout=layout, groups=2, lengths=torch.tensor([50, 20]))


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16(assert_close, norm):
    check(assert_close, make_inputs(2, 60, 24, 9), norm, torch.bfloat16, groups=4, lengths=torch.tensor([60, 33]))


def test_more_strips_than_parts(assert_close):
    """70 utterances of two strips: partial sums hold several strips each."""
    check(assert_close, make_inputs(70, 100, 4, 3), "layer")


def test_no_real_frame(assert_close):
    """An empty batch leaves the running statistics as they were."""
    lengths = torch.tensor([0, 0], dtype=torch.int32)
    check(assert_close, make_inputs(2, 5, 4, 3), "batch in training", lengths=lengths)


def test_padding_never_leaks():
    x, weight, bias, gamma, beta = (p.float() for p in make_inputs(2, 130, 8, 31))
    lengths = torch.tensor([130, 50])
    f = call(ops.glu_depthwise_conv, "batch in training", lengths=lengths)
    with kernels():
        clean = f(x, weight, bias, gamma, beta)
        x[1, 50:] = float("nan")
        assert torch.equal(f(x, weight, bias, gamma, beta), clean)


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_for_any_number_of_threads(norm):
    inputs, dout = make_inputs(3, 203, 12, 31), [torch.randn(3, 203, 12)]
    inputs = inputs[:3] if norm == "none" else inputs
    f = call(ops.glu_depthwise_conv, norm, groups=2, lengths=torch.tensor([203, 60, 111]))
    results = []
    for threads in (1, 2, 5):
        with kernels(threads=threads):
            out, grads = run(f, inputs, dout, torch.float32)
        results.append([*out, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_the_kernels_cannot_serve_is_said():
    x, weight, bias, *_ = make_inputs(1, 5, 2, 3)
    with kernels(), pytest.raises(NotImplementedError, match=r"dtype torch\.float64 is not one of"):
        ops.glu_depthwise_conv(x, weight, bias)
