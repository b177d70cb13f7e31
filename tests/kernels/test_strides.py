"""The kernels over shapes and strides that Hypothesis draws.

Strides change no bit, and what lies between them is NaN. An index that is wrong somewhere is an error of the size of the
numbers themselves: how precise the kernels are is for the other tests.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import test_feed_forward as feed_forward
from . import test_glu_depthwise_conv as glu_depthwise_conv
from . import test_relpos_attention as relpos_attention
from . import test_residual_layer_norm as residual_layer_norm

# a failing example is shown as it is: the interpreter would take minutes to shrink it
SOME = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.usefixtures("poisoned")
FRAMES = st.integers(1, 40)
DEVICE = relpos_attention.DEVICE


def compare(found, contiguous, ref):
    for name, value in ref.items():
        assert torch.equal(found[name], contiguous[name]), f"{name} depends on strides"
        error, size = (found[name].double() - value).abs().max().item(), value.abs().max().item()
        assert error <= 1e-3 * max(1.0, size), f"{name}: error {error:.3g}, values to {size:.3g}"


@SOME
@given(b=st.integers(1, 2), t=FRAMES, d=st.integers(2, 40), data=st.data())
def test_residual_layer_norm(lay_out, b, t, d, data):
    inputs = residual_layer_norm.make_inputs((b, t, d), torch.float32)
    found = residual_layer_norm.run(*(lay_out(data, x) for x in inputs))
    ref = residual_layer_norm.eager(*inputs, torch.float64)
    compare(found, residual_layer_norm.run(*inputs), ref)


@SOME
@given(b=st.integers(1, 2), t=FRAMES, d=st.integers(2, 40), f=st.integers(1, 140), data=st.data())
def test_feed_forward(lay_out, b, t, d, f, data):
    inputs, dout = feed_forward.make_inputs((b, t, d), f, torch.float32)
    found = feed_forward.run([lay_out(data, x) for x in inputs], lay_out(data, dout))
    # the products of torch may round as the strides of the weights suggest
    ref = feed_forward.eager(inputs, dout, torch.float64)
    compare(found, found, ref)


@SOME
@given(
    t=st.integers(2, 40), c=st.integers(2, 40), k=st.sampled_from([1, 5, 31]),
    norm=st.sampled_from(["none", "layer", "batch"]), data=st.data(),
)  # fmt: skip
def test_glu_depthwise_conv(lay_out, t, c, k, norm, data):
    # a statistic of one frame is no statistic
    lengths = data.draw(st.lists(st.integers(2, t), min_size=1, max_size=2))
    inputs = glu_depthwise_conv.make_inputs(len(lengths), t, c, k, norm, torch.float32)
    dout = torch.randn(len(lengths), t, c, device=DEVICE)
    found, contiguous = (
        glu_depthwise_conv.run({n: x if x is None else lay(x) for n, x in inputs.items()}, lay(dout), lengths, norm, 1)
        for lay in (lambda x: lay_out(data, x), lambda x: x)
    )
    out, grads = glu_depthwise_conv.with_gradients(inputs, dout, lengths, norm, 1, torch.float64)
    compare(*({"out": o, **g} for o, g in (found, contiguous)), {"out": out, **grads})


@SOME
@given(t=FRAMES, h=st.integers(1, 2), d=st.sampled_from([8, 16, 24]), data=st.data())
def test_relpos_attention(lay_out, t, h, d, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, t), min_size=1, max_size=2)), device=DEVICE)
    inputs, dout = relpos_attention.make_inputs(len(lengths), t, h, d, torch.float32)
    results = (
        relpos_attention.run([lay_out(data, x) for x in inputs], lay_out(data, dout), lengths),
        relpos_attention.run(inputs, dout, lengths),
        relpos_attention.with_gradients(inputs, dout, lengths, torch.float64),
    )
    compare(*(dict(zip(("out", *relpos_attention.NAMES), values)) for values in results))
