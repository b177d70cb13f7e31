"""Streaming equals one computation on the whole utterance, and that equals a loop over chunks written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine, pack
from lcconformer.ops.registry import record
from lcconformer.positions import relative_sinusoids
from lcconformer.streaming import StreamState

from .conftest import with_random_values

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=7, dropout=0.0)
CONFIGS = {
    "layer": {},
    "batch": {"conv_norm": "batch"},
    "statistics per depth": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    "no norm, no positions": {"conv_norm": "none", "position": "none"},
    "rotary": {"position": "rotary"},
    "convolution first": {"convolution_first": True},
    "conditioned": {"conditioning": ("layer_norm", "step", "film", "lora")},
    "unshared": {"sharing": "none"},
    "peer": {"padding": "peer"},
    "projected": {"input_dim": 10},
    "stacked": {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 3},
    "convolved": {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 4},
}
SIZES = {
    "wide": (4, 6, 2),
    "no view": (4, 6, 0),
    "no past": (5, 0, 3),
    "view beyond chunk": (2, 9, 5),
    "one frame": (1, 3, 1),
}


def make_encoder(dtype=torch.float64, **changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).to(dtype)
    with_random_values(encoder)
    return encoder.eval()


def speech(encoder, frames=(23, 9, 0, 16)):
    """(x with NaN in the padding, lengths) of utterances of so many frames at the layers, the last one not always full."""
    factor = encoder.config.subsampling_factor
    lengths = torch.tensor([max(n * factor - factor // 2, 0) for n in frames])
    x = torch.randn(len(frames), max(lengths), encoder.config.input_dim or 16, dtype=next(encoder.parameters()).dtype)
    for row, n in zip(x, lengths.tolist()):
        row[n:] = torch.nan
    return x, lengths


def real(outputs, lengths):
    return torch.cat([out[:n] for out, n in zip(outputs, lengths.tolist())])


def run(stream, x, lengths):
    """(outputs [B, T, D], lengths) of all chunks of a batch, in step."""
    state, outputs, total = stream.start(len(x)), [], 0
    for block, count in stream.blocks(x, lengths):
        out, out_lengths, state = stream(block, count, state)
        outputs.append(out)
        total = total + out_lengths
    assert torch.equal(state.seen, total)
    return torch.cat(outputs, 1), total


def by_hand(encoder, x, chunk, left, right, depth):
    """One utterance ``x [T, d_model]``, chunk by chunk and frame by frame; returns hidden states ``[T, d_model]``."""
    layer, config, (t, d) = encoder.layers[0], encoder.config, x.shape
    a, c, h = layer.attention, layer.conv, config.num_heads
    reach, table = config.conv_kernel_size // 2, relative_sinusoids(t + right, d, device=x.device, dtype=x.dtype)

    def position(distance):
        return a.pos(table[t + right - 1 - distance]).view(h, d // h)

    def ffn(module, x):
        return x + 0.5 * module.down(F.silu(module.up(module.norm(x))))

    states = [x]
    blocks = [x[i : i + chunk + right] for i in range(0, t, chunk)]
    for _ in range(depth):
        keys, values, gates, after = [], [], [], []  # of frames in their own chunk
        for i, block in zip(range(0, t, chunk), blocks):
            block = ffn(layer.ffn1, block)
            q, k, v = (y.view(-1, h, d // h) for y in a.qkv(a.norm(block)).chunk(3, -1))
            first = max(i - left, 0)
            ks, vs = (torch.stack([*old[first:i], *new]) for old, new in ((keys, k), (values, v)))
            o = []
            for n in range(len(block)):
                score = torch.stack(
                    [
                        ((q[n] + a.u) * ks[j] + (q[n] + a.v_bias) * position(i + n - first - j)).sum(-1)
                        for j in range(len(ks))
                    ]
                )  # [keys, H]
                o.append(((score / math.sqrt(d // h)).softmax(0)[..., None] * vs).sum(0).flatten())
            block = block + a.out(torch.stack(o))
            g = F.glu(c.pointwise1(c.norm(block)), -1)
            before = [torch.zeros(d, dtype=x.dtype)] * reach + gates
            seen = torch.stack([*before[len(before) - reach :], *g] + [torch.zeros(d, dtype=x.dtype)] * reach)
            w = c.depthwise.weight[:, 0]  # [d, K]
            y = torch.stack([(seen[n : n + w.shape[1]].t() * w).sum(1) for n in range(len(block))]) + c.depthwise.bias
            block = ffn(layer.ffn2, block + c.pointwise2(F.silu(c.depthwise_norm(y))))
            after.append(layer.norm(block))
            keys += k[:chunk]
            values += v[:chunk]
            gates += g[:chunk]
        blocks = after
        states.append(torch.cat([b[:chunk] for b in blocks]))
    return states


@pytest.mark.parametrize(("chunk", "left", "right"), SIZES.values(), ids=SIZES)
def test_whole_is_what_is_written_out_by_hand(chunk, left, right):
    encoder = make_encoder()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    lengths = torch.tensor([11, 7])
    stream = encoder.streaming(chunk=chunk, left=left, right=right, depth=2)
    with torch.no_grad():
        _, _, states = stream.whole(x, lengths, return_hidden_states=True)
        for row, n in zip(range(2), lengths.tolist()):
            for got, want in zip(states, by_hand(encoder, x[row, :n], chunk, left, right, 2), strict=True):
                torch.testing.assert_close(got[row, :n], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_stream_equals_the_whole(name):
    encoder = make_encoder(**CONFIGS[name])
    x, lengths = speech(encoder)
    stream = encoder.streaming(chunk=4, left=6, right=2)
    with torch.no_grad():
        want, want_lengths = stream.whole(x, lengths)
        got, got_lengths = run(stream, x, lengths)
        # and everything in one chunk is the encoder itself
        once, _ = encoder.streaming(chunk=32, left=0, right=0).whole(x, lengths)
        full, _ = encoder(x, lengths)
    assert torch.equal(got_lengths, want_lengths)
    torch.testing.assert_close(real(got, got_lengths), real(want, want_lengths), rtol=0, atol=1e-12)
    if name == "peer":  # which sees the padding
        full, _ = encoder.packed(*pack(x, lengths))
        once = pack(once, want_lengths)[0]
    else:
        once, full = (real(y, want_lengths) for y in (once, full))
    torch.testing.assert_close(once, full, rtol=0, atol=1e-12)
    assert (real(want, want_lengths) - full).abs().max() > 1e-3


@pytest.mark.parametrize(("chunk", "left", "right"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["layer", "convolved"])
def test_stream_equals_the_whole_at_all_sizes(name, chunk, left, right):
    encoder = make_encoder(**CONFIGS[name])
    x, lengths = speech(encoder)
    stream = encoder.streaming(chunk=chunk, left=left, right=right, depth=2)
    with torch.no_grad():
        want, want_lengths = stream.whole(x, lengths)
        got, got_lengths = run(stream, x, lengths)
    torch.testing.assert_close(real(got, got_lengths), real(want, want_lengths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"rotary"}))
def test_packed_weights(name, dtype, assert_close):
    """By the tolerance rule, and where the past is that of a bfloat16 encoder."""
    exact = make_encoder(**CONFIGS[name])
    encoder = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict({n: p.double() for n, p in encoder.state_dict().items()})
    x, lengths = speech(encoder)
    with torch.no_grad():
        ref, want_lengths = exact.streaming(chunk=4, left=6, right=2).whole(x.double(), lengths)
        stream = encoder.streaming(chunk=4, left=6, right=2)
        with record() as served:
            got, _ = run(stream, x, lengths)
        assert served["shared_loop"] == "cpu"
        with engine("modules"), record() as served:
            modules, _ = run(stream, x, lengths)
        assert "shared_loop" not in served
        with backend("torch"):
            low, _ = stream.whole(x, lengths)
    for by, out in (("packed weights", got), ("modules", modules)):
        assert_close(by, *(real(y, want_lengths) for y in (out, ref, low)), 2)


def test_packed_weights_follow_the_weights():
    encoder = make_encoder(torch.float32)
    x, lengths = speech(encoder)
    stream = encoder.streaming(chunk=4, left=6, right=2)
    with torch.no_grad():
        before, n = run(stream, x, lengths)
        encoder.layers[0].attention.u += 1.0
        after, _ = run(stream, x, lengths)
        want, _ = stream.whole(x, lengths)
    assert not torch.equal(real(before, n), real(after, n))
    torch.testing.assert_close(real(after, n), real(want, n), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["layer", "convolved"])
def test_streams_of_different_phase(name):
    """Three rows that begin, wait, end and begin anew at times of their own; five utterances come out as alone."""
    encoder = make_encoder(**CONFIGS[name])
    stream = encoder.streaming(chunk=4, left=6, right=2)
    frames = (9, 23, 4, 13, 6)
    x, lengths = speech(encoder, frames)
    with torch.no_grad():
        want, want_lengths = stream.whole(x, lengths)
        queues = [[0, 3], [1], [2, 4]]
        waits = [0, 2, 1]  # calls before a row begins
        state, got = stream.start(3), {u: [] for u in range(5)}
        # rows hold rubbish of an earlier utterance
        state = state._replace(convolution=torch.randn_like(state.convolution), seen=torch.tensor([3, 9, 1]))
        state = state._replace(front_end=tuple(torch.randn_like(f) for f in state.front_end))
        state = state.restart(torch.tensor([True, True, True]))
        cut = [list(stream.blocks(x[u : u + 1, : lengths[u]], lengths[u : u + 1])) for u in range(5)]
        nothing = torch.full_like(cut[0][0][0], torch.nan)
        for turn in range(20):
            rows, ends = [], []
            for row in range(3):
                idle = turn < waits[row] or (turn + row) % 4 == 3 or not queues[row]
                if idle:
                    rows.append((None, nothing, torch.tensor([0])))
                    ends.append(False)
                else:
                    u = queues[row][0]
                    rows.append((u, *cut[u].pop(0)))
                    ends.append(not cut[u])
                    if ends[-1]:
                        queues[row].pop(0)
            out, counts, state = stream(torch.cat([r[1] for r in rows]), torch.cat([r[2] for r in rows]), state)
            for (u, _, _), y, n in zip(rows, out, counts.tolist()):
                if u is not None:
                    got[u].append(y[:n])
            state = state.restart(torch.tensor(ends))
    assert not any(queues)
    for u, n in enumerate(want_lengths.tolist()):
        torch.testing.assert_close(torch.cat(got[u]), want[u, :n], rtol=0, atol=1e-12)


def test_output_waits_for_the_view_alone():
    """Whatever the depth, a chunk does not depend on what comes after its view, and does on the last frame of it."""
    encoder = make_encoder(num_layers=6)
    stream = encoder.streaming(chunk=4, left=8, right=2)
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        want, _ = stream.whole(x)
        for changed, same in ((10, True), (9, False)):
            other = x.clone()
            other[:, changed:] += 1.0
            assert torch.equal(stream.whole(other)[0][:, :8], want[:, :8]) is same


@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_trains(checkpointing):
    """Every parameter gets a gradient, the right one, and recomputation gives the same."""
    encoder = make_encoder(num_layers=2).train()
    encoder.gradient_checkpointing = checkpointing
    stream = encoder.streaming(chunk=3, left=4, right=1)
    x, lengths = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True), torch.tensor([8, 5])
    real_frames = (torch.arange(8) < lengths[:, None])[..., None]

    def loss():
        return (stream.whole(x, lengths)[0] * real_frames).sin().sum()

    loss().backward()
    assert not x.grad[1, 5:].any()
    for name, parameter in [*encoder.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        with torch.no_grad():
            step = torch.randn_like(parameter) * 1e-5
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
        slope = (parameter.grad * step).sum()
        torch.testing.assert_close((above - below) / 2, slope, rtol=1e-5, atol=1e-11, msg=name)


def test_dropout_of_attention_and_hidden_states():
    encoder = make_encoder(dropout=0.4).train()
    stream = encoder.streaming(chunk=3, left=4, right=1)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    first, _, states = stream.whole(x, return_hidden_states=True)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], first)
    assert len(states) == 4
    assert not torch.equal(first, stream.whole(x)[0])
    for given in (torch.zeros(1, 0, 16, dtype=torch.float64), torch.zeros(0, 5, 16, dtype=torch.float64)):
        assert stream.whole(given)[0].shape == given.shape


def test_hooked_modules_are_called():
    encoder = make_encoder()
    x, lengths = speech(encoder)
    stream = encoder.streaming(chunk=4, left=6, right=2)
    with torch.no_grad():
        want, n = run(stream, x, lengths)
        seen = []
        for module in (encoder.layers[0], encoder.layers[0].attention, encoder.layers[0].conv.depthwise):
            module.register_forward_hook(lambda *a: seen.append(1))
        got, _ = run(stream, x, lengths)
    assert len(seen) == 3 * 3 * 6
    torch.testing.assert_close(real(got, n), real(want, n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["layer", "convolved"])
def test_exports(name):
    """As a function of tensors: for any number of streams."""
    encoder = make_encoder(torch.float32, num_layers=2, **CONFIGS[name])
    stream = encoder.streaming(chunk=4, left=6, right=2)
    x, lengths = speech(encoder, (9, 6, 3))
    (first, n), (second, m), *_ = stream.blocks(x, lengths)
    row = torch.export.Dim("row", min=2)
    loops, front_end = ({1: row},) * 3, ({0: row},) * len(stream.start(1).front_end)
    dynamic = ({0: row}, {0: row}, StreamState({0: row}, *loops, front_end))
    with torch.no_grad():
        program = torch.export.export(stream, (first, n, stream.start(3)), dynamic_shapes=dynamic).module()
        state, exported = stream.start(2), stream.start(2)
        for block, count in ((first, n), (second, m)):
            want, want_n, state = stream(block[:2], count[:2], state)
            got, got_n, exported = program(block[:2], count[:2], exported)
            assert torch.equal(got_n, want_n)
            torch.testing.assert_close(real(got, got_n), real(want, want_n), rtol=1e-4, atol=1e-5)


REFUSED = {
    "group": ({"conv_norm": "group"}, {}, NotImplementedError, "GroupNorm takes statistics over all frames"),
    "hidden": ({"position": "rotary", "rotary_input": "hidden"}, {}, NotImplementedError, "rotary_input='hidden'"),
    "peer": (
        {"padding": "peer", "input_dim": 4, "subsampling": "stack", "subsampling_factor": 2},
        {},
        NotImplementedError,
        "sees padding",
    ),
    "chunk": ({}, {"chunk": 0}, ValueError, "chunk is 0; expected an integer of at least 1"),
    "left": ({}, {"left": -1}, ValueError, "left is -1"),
    "right": ({}, {"right": 1.5}, ValueError, "right is 1.5"),
    "depth": ({}, {"depth": 4}, ValueError, "depth is 4; expected an integer from 1 to num_layers = 3"),
}


@pytest.mark.parametrize(("changes", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(changes, options, error, message):
    encoder = make_encoder(**changes)
    with pytest.raises(error, match=message):
        encoder.streaming(**options)


def test_refuses_bad_calls():
    encoder = make_encoder(torch.float32, conv_norm="batch")
    stream = encoder.streaming(chunk=4, left=6, right=2)
    x, n, state = torch.randn(2, 6, 16), torch.tensor([6, 6]), stream.start(2)
    for given, message in (
        ((x[:, :5], n, state), r"input has shape \[2, 5, 16\]; expected \[B, frames, width\] = \[2, 6, 16\]"),
        ((x[:1], n, state), r"input has shape \[1, 6, 16\]"),
        ((x, n + 1, state), "lengths span 7 ... 7; expected values from 0 to T = 6"),
        ((x, n.float(), state), "lengths has dtype torch.float32"),
        ((x, None, state), "lengths is a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(*given)
    encoder.train()
    for call in (lambda: stream(x, n, state), lambda: stream.whole(x)):
        with pytest.raises(NotImplementedError, match="a BatchNorm in training mode"):
            call()
    encoder.layers.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm1d) else m)
    assert stream.whole(x)[0].requires_grad
