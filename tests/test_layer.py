"""`ConformerLayer` against an oracle that takes one utterance at a time, in float64, written from the papers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lcconformer import ConformerConfig, ConformerLayer

BASE = ConformerConfig(d_model=16, num_heads=4, ffn_dim=24, num_layers=1, conv_kernel_size=5, dropout=0.0)
ACTIVATION = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
CASES = [
    {},
    {"conv_norm": "batch"},
    {"conv_norm": "group", "conv_norm_groups": 4},
    {"conv_norm": "none", "position": "none"},
    {"position": "rotary", "activation": "gelu"},
    {"position": "rotary", "rotary_input": "hidden", "conv_norm": "batch", "convolution_first": True},
    {"convolution_first": True, "attention_bias": False, "conv_bias": False, "activation": "relu"},
    {"num_heads": 1, "conv_kernel_size": 31, "layer_norm_eps": 1e-3},
    {"d_model": 6, "num_heads": 3, "conv_kernel_size": 1, "ffn_dim": 1},
]


def make_layer(config: ConformerConfig, dtype: torch.dtype = torch.float64) -> ConformerLayer:
    """A layer with every parameter and statistic away from its initial value."""
    layer = ConformerLayer(config).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return layer


def relative_scores(q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor, u: torch.Tensor, v: torch.Tensor):
    """Transformer-XL scores ``[H, T, T]`` of ``q, k [H, T, D]``, by padding and viewing (Dai et al. 2019, appendix B)."""
    content = (q + u[:, None]) @ k.transpose(1, 2)
    position = (q + v[:, None]) @ pos.permute(1, 2, 0)  # [H, T, 2T-1]
    heads, t, rows = position.shape
    padded = F.pad(position, (1, 0)).view(heads, rows + 1, t)
    return content + padded[:, 1:].reshape(heads, t, rows)[:, :, :t]


def oracle(config, p, xs, training, statistics):
    """The layer of parameters ``p`` on a list of utterances ``[T, d_model]``, each without any padding."""
    d, heads, act = config.d_model, config.num_heads, ACTIVATION[config.activation]

    def norm(x, name):
        return F.layer_norm(x, (d,), p[f"{name}.weight"], p[f"{name}.bias"], config.layer_norm_eps)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def feed_forward(x, name):
        return x + 0.5 * linear(act(linear(norm(x, f"{name}.norm"), f"{name}.up")), f"{name}.down")

    def rotate(x):  # [T, H, D], pairs (i, i + D/2)
        half = x.shape[-1] // 2
        angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * torch.tensor(
            [10000 ** (-k / half) for k in range(half)], dtype=x.dtype
        )
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def attention(x):
        h = norm(x, "attention.norm")
        t, width = len(h), d // heads
        hr = h
        if config.position == "rotary" and config.rotary_input == "hidden":
            hr = rotate(h.view(t, heads, width)).reshape(t, d)
        q, k = (z.view(t, heads, width) for z in linear(hr, "attention.qkv").split(d, -1)[:2])
        v = linear(h, "attention.qkv").split(d, -1)[2].view(t, heads, width)
        if config.position == "rotary" and config.rotary_input == "query_key":
            q, k = rotate(q), rotate(k)
        q, k, v = (z.transpose(0, 1) for z in (q, k, v))
        if config.position == "relative":
            table = torch.zeros(2 * t - 1, d, dtype=x.dtype)
            for row in range(2 * t - 1):
                for i in range(0, d, 2):
                    angle = (t - 1 - row) / 10000 ** (i / d)
                    table[row, i], table[row, i + 1] = math.sin(angle), math.cos(angle)
            pos = linear(table, "attention.pos").view(-1, heads, width)
            scores = relative_scores(q, k, pos, p["attention.u"], p["attention.v_bias"])
        else:
            scores = q @ k.transpose(1, 2)
        out = (scores / math.sqrt(width)).softmax(-1) @ v
        return x + linear(out.transpose(0, 1).reshape(t, d), "attention.out")

    def convolution(xs):
        ys = []
        for x in xs:
            y = F.glu(linear(norm(x, "conv.norm"), "conv.pointwise1"), -1)
            k = config.conv_kernel_size
            y = F.pad(y, (0, 0, k // 2, k // 2)).unfold(0, k, 1)  # [T, d, K]
            y = (y * p["conv.depthwise.weight"][:, 0]).sum(-1)
            ys.append(y + p["conv.depthwise.bias"] if config.conv_bias else y)
        if config.conv_norm == "layer":
            ys = [norm(y, "conv.depthwise_norm") for y in ys]
        elif config.conv_norm != "none":
            affine = p["conv.depthwise_norm.weight"], p["conv.depthwise_norm.bias"]
            if config.conv_norm == "group":
                ys = [F.group_norm(y.T[None], config.conv_norm_groups, *affine, config.layer_norm_eps)[0].T for y in ys]
            else:
                frames = torch.cat(ys)  # all real frames of the batch, and nothing else
                frames = F.batch_norm(frames, *statistics, *affine, training, eps=config.layer_norm_eps)
                ys = frames.split([len(y) for y in ys])
        return [x + linear(act(y), "conv.pointwise2") for x, y in zip(xs, ys)]

    xs = [feed_forward(x, "ffn1") for x in xs]
    if config.convolution_first:
        xs = [attention(x) for x in convolution(xs)]
    else:
        xs = convolution([attention(x) for x in xs])
    return [norm(feed_forward(x, "ffn2"), "norm") for x in xs]


def statistics_of(layer):
    norm = layer.conv.depthwise_norm
    return [norm.running_mean.clone(), norm.running_var.clone()] if hasattr(norm, "running_mean") else []


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_layer_and_all_gradients(changes, training):
    """A padded batch against its utterances one by one, in float64: output, gradients of input and of every parameter."""
    config = BASE.replace(**changes)
    layer = make_layer(config).train(training)
    lengths = [9, 1, 6]
    x = torch.randn(3, 9, config.d_model, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    statistics = statistics_of(layer)

    parameters = dict(layer.named_parameters())
    want = oracle(config, parameters, [x[i, :n] for i, n in enumerate(lengths)], training, statistics)
    want_loss = sum((w * weight[i, : len(w)]).sum() for i, w in enumerate(want))
    want_gradients = torch.autograd.grad(want_loss, [x, *parameters.values()])

    out = layer(x, torch.tensor(lengths))
    for i, w in enumerate(want):
        torch.testing.assert_close(out[i, : len(w)], w, rtol=0, atol=1e-9)
    loss = sum((out[i, :n] * weight[i, :n]).sum() for i, n in enumerate(lengths))
    gradients = torch.autograd.grad(loss, [x, *parameters.values()])
    for name, got, expected in zip(["input", *parameters], gradients, want_gradients):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for i, n in enumerate(lengths):
        assert gradients[0][i, n:].abs().sum() == 0, "padding got a gradient"

    if statistics:
        for got, expected in zip(statistics_of(layer), statistics):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert layer.conv.depthwise_norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_float32(changes):
    config = BASE.replace(**changes)
    layer = make_layer(config, torch.float32).eval()
    exact = copy.deepcopy(layer).double()
    x, lengths = torch.randn(2, 23, config.d_model), torch.tensor([23, 11])
    want = exact(x.double(), lengths)
    torch.testing.assert_close(layer(x, lengths).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 7, 64, 203])
def test_relative_attention_over_odd_lengths(frames):
    """Attention alone, all gradients, with u and v_bias of the size of queries so that each term matters."""
    config = BASE.replace(d_model=12, num_heads=3)
    attention = make_layer(config).attention
    with torch.no_grad():
        attention.u.normal_(), attention.v_bias.normal_()
    h = torch.randn(1, frames, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(h)
    leaves = [h, *(p for n, p in attention.named_parameters() if not n.startswith("norm"))]
    got = attention(h, None, attention.positions(h))

    q, k, v = (z.view(frames, 3, 4).transpose(0, 1) for z in attention.qkv(h)[0].split(12, -1))
    position = torch.arange(frames - 1, -frames, -1, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    table = torch.zeros(2 * frames - 1, 12, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = (position * rate).sin(), (position * rate).cos()
    pos = attention.pos(table).view(-1, 3, 4)
    probabilities = (relative_scores(q, k, pos, attention.u, attention.v_bias) / 2.0).softmax(-1)
    want = attention.out((probabilities @ v).transpose(0, 1).reshape(1, frames, 12))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad((got * weight).sum(), leaves)
    for g, w in zip(gradients, torch.autograd.grad((want * weight).sum(), leaves)):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-9)


def test_relative_positions_know_left_from_right():
    """Reversing time changes the result: distances are signed."""
    layer = make_layer(BASE.replace(conv_kernel_size=1)).eval()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert (layer(x).flip(1) - layer(x.flip(1))).abs().max() > 1e-3
    blind = make_layer(BASE.replace(conv_kernel_size=1, position="none")).eval()
    torch.testing.assert_close(blind(x).flip(1), blind(x.flip(1)), rtol=0, atol=1e-12)


def test_peer_padding_leaks_and_masked_does_not():
    """padding="peer" lets the convolution see what is behind the last frame; attention never does."""
    x, lengths = torch.randn(1, 9, 16, dtype=torch.float64), torch.tensor([5])
    other = x.clone()
    other[:, 5:] = torch.randn(4, 16)
    for padding, leaks in (("masked", False), ("peer", True)):
        layer = make_layer(BASE.replace(padding=padding)).eval()
        difference = (layer(x, lengths) - layer(other, lengths))[:, :5].abs().amax(-1)[0]
        assert (difference[:3] < 1e-12).all()
        # K = 5: the last two frames look beyond the end
        assert ((difference[3:] > 1e-6) if leaks else (difference[3:] < 1e-12)).all()


def test_an_utterance_without_frames_gives_finite_values():
    for changes in CASES:
        layer = make_layer(BASE.replace(**changes)).train()
        x = torch.randn(2, 6, layer.norm.normalized_shape[0], dtype=torch.float64, requires_grad=True)
        out = layer(x, torch.tensor([6, 0]))
        out.sum().backward()
        assert out.isfinite().all(), changes
        assert all(p.grad.isfinite().all() for p in layer.parameters()), changes
        assert x.grad.isfinite().all(), changes


def test_dropout_acts_on_every_branch():
    """With dropout in training, zeroing all branches but one still gives a random result."""
    branches = {"ffn1": "ffn1.down", "attention": "attention.out", "conv": "conv.pointwise2", "ffn2": "ffn2.down"}
    x = torch.randn(1, 8, 16)
    for branch in branches:
        layer = make_layer(BASE.replace(dropout=0.5), torch.float32)
        with torch.no_grad():
            for other, output in branches.items():
                if other != branch:
                    layer.get_submodule(output).weight.zero_()
                    layer.get_submodule(output).bias.zero_()
        assert not torch.equal(layer.train()(x), layer(x)), branch
        assert torch.equal(layer.eval()(x), layer(x)), branch


def test_dropout_keeps_the_mean():
    layer = make_layer(BASE.replace(dropout=0.2)).train()
    h = layer.attention.norm(torch.randn(1, 6, 16, dtype=torch.float64)).expand(20_000, 6, 16)
    with torch.no_grad():
        mean = layer.attention(h, None, layer.positions(h)).mean(0)
        want = layer.eval().attention(h[:1], None, layer.positions(h))[0]
    torch.testing.assert_close(mean, want, rtol=0, atol=0.03)


def test_positions_may_be_left_out():
    for changes in ({}, {"position": "rotary"}, {"position": "none"}):
        layer = make_layer(BASE.replace(**changes)).eval()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        assert torch.equal(layer(x), layer(x, None, layer.positions(x)))
