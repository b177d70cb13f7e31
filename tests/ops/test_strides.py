"""The references over shapes and strides that Hypothesis draws, each against the formula of its op in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lcconformer import backend, ops

NORMS = ["none", "layer", "batch", "group"]
SOME = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _reference():
    with backend("torch"):
        yield


def make(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@SOME
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), alpha=st.sampled_from([1.0, 0.5, -2.0]), data=st.data()
)
def test_residual_layer_norm(lay_out, shape, alpha, data):
    x, y, weight, bias = (lay_out(data, make(*s)) for s in (shape, shape, shape[-1:], shape[-1:]))
    s, n = ops.residual_layer_norm(x, y, weight, bias, alpha=alpha)
    same(s, x + alpha * y)
    same(n, normalised(x + alpha * y, weight, bias))


@SOME
@given(
    b=st.integers(1, 3), t=st.integers(1, 5), d=st.integers(1, 6), f=st.integers(1, 6), biased=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_feed_forward(lay_out, b, t, d, f, biased, data):
    shapes = [(b, t, d), (d,), (d,), (f, d), (f,), (d, f), (d,)]
    x, weight, bias, w1, b1, w2, b2 = (lay_out(data, make(*s)) for s in shapes)
    out = ops.feed_forward(x, weight, bias, w1, b1 if biased else None, w2, b2 if biased else None)
    u = torch.einsum("btd,fd->btf", normalised(x, weight, bias), w1) + b1 * biased
    same(out, x + (torch.einsum("btf,df->btd", u * u.sigmoid(), w2) + b2 * biased) / 2)


@SOME
@given(t=st.integers(1, 6), h=st.integers(1, 3), d=st.integers(1, 5), packed=st.booleans(), data=st.data())
def test_relpos_attention(lay_out, t, h, d, packed, data):
    """Score by score, utterance by utterance."""
    lengths = data.draw(st.lists(st.integers(0, t), min_size=1, max_size=3))
    rows = (sum(lengths),) if packed else (len(lengths), t)
    q, k, v = (lay_out(data, make(*rows, h, d)) for _ in range(3))
    pos, u, v_bias = (lay_out(data, make(*s)) for s in ((2 * t - 1, h, d), (h, d), (h, d)))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    where = {"cu_seqlens": ends} if packed else {"lengths": torch.tensor(lengths)}
    out = ops.relpos_attention(q, k, v, pos, u, v_bias, **where)
    for b, n in enumerate(lengths):
        mine = slice(ends[b], ends[b + 1]) if packed else (b, slice(n))
        distance = t - 1 - torch.arange(n)[:, None] + torch.arange(n)  # [i, j], row of pos
        scores = torch.einsum("ihd,jhd->hij", q[mine] + u, k[mine])
        scores = scores + torch.einsum("ihd,ijhd->hij", q[mine] + v_bias, pos[distance])
        same(out[mine], torch.einsum("hij,jhd->ihd", (scores / d**0.5).softmax(-1), v[mine]))


@SOME
@given(
    t=st.integers(1, 20), c=st.integers(1, 6), k=st.sampled_from([1, 3, 9, 31]), norm=st.sampled_from(NORMS),
    data=st.data(),
)  # fmt: skip
def test_glu_depthwise_conv(lay_out, t, c, k, norm, data):
    """An utterance of a padded batch gets what torch.nn gives it alone (batch norm: its real frames among all)."""
    lengths = data.draw(st.lists(st.integers(2, t + 2).map(lambda n: min(n, t)), min_size=1, max_size=3))
    assume(norm != "group" or c * min(lengths) > 1)  # F.group_norm refuses a group of one value
    shapes = {"x": (len(lengths), t, 2 * c), "weight": (c, k), "bias": (c,)}
    if norm != "none":
        shapes |= {"norm_weight": (c,), "norm_bias": (c,)}
    args = {name: lay_out(data, make(*shape)) for name, shape in shapes.items()}
    args |= {"norm": norm, "num_groups": 1, "lengths": torch.tensor(lengths)}
    if norm == "batch":
        args |= {"running_mean": make(c), "running_var": 0.5 + make(c).square(), "training": True}
    stored = {name: args[name].clone() for name in ("running_mean", "running_var") if name in args}
    out = ops.glu_depthwise_conv(**args)
    convolved = []
    for row, n in zip(args["x"], lengths):
        glu = F.pad(F.glu(row[:n], -1), (0, 0, 0, t - n))
        windows = F.pad(glu, (0, 0, k // 2, k // 2)).unfold(0, k, 1)  # [T, C, K]
        convolved.append((windows * args["weight"]).sum(-1) + args["bias"])
    real = torch.cat([y[:n] for y, n in zip(convolved, lengths)])
    gamma, beta = args.get("norm_weight"), args.get("norm_bias")
    for i, (y, n) in enumerate(zip(convolved, lengths)):
        expected = y[:n]
        if norm == "layer":
            expected = F.layer_norm(expected, (c,), gamma, beta)
        elif norm == "batch":
            mean, var = real.mean(0), real.var(0, unbiased=False)
            expected = (expected - mean) / (var + 1e-5).sqrt() * gamma + beta
        elif norm == "group":
            expected = F.group_norm(expected.t()[None], 1, gamma, beta)[0].t()
        same(out[i, :n], F.silu(expected))
    if norm == "batch" and len(real) > 1:
        same(args["running_mean"], 0.9 * stored["running_mean"] + 0.1 * real.mean(0))
        same(args["running_var"], 0.9 * stored["running_var"] + 0.1 * real.var(0))
