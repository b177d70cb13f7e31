"""The loop: prefixes, padding, batch statistics, adaptive depth, accounting."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lcconformer import ConformerConfig, ConformerEncoder, ConformerLayer, ExitRule, backend, engine

from .conftest import with_random_values

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, dropout=0.0)
SHARINGS = ["all", "none", "sequence:2", "cycle:2", "middle_cycle:1", "prelude_core_coda:1,2,0", (0, 1, 1, 0)]
NORMS = ["layer", "batch", "group", "none"]
FRONT_ENDS = [
    {},
    {"input_dim": 10},
    {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 3},
    {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 2},
    {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 4},
]


def make_encoder(dtype=torch.float32, **changes) -> ConformerEncoder:
    """An encoder with nothing at its initial value."""
    encoder = ConformerEncoder(BASE.replace(**changes)).to(dtype)
    with_random_values(encoder)
    return encoder


def poisoned(x, lengths):
    """``x`` with NaN behind each utterance."""
    x = x.clone()
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = torch.nan
    return x


# prefixes


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_prefix_property(sharing, norm):
    """The output at depth k is hidden state k of the full run, bit for bit."""
    encoder = make_encoder(sharing=sharing, conv_norm=norm).eval()
    check_prefixes(encoder)


@pytest.mark.parametrize("conditioning", [("layer_norm",), ("step",), ("film",), ("lora",), ("film", "lora")], ids=str)
@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_prefix_property_with_conditioning(conditioning, position):
    check_prefixes(make_encoder(conditioning=conditioning, position=position).eval())


def test_prefix_property_with_statistics_per_depth():
    check_prefixes(make_encoder(conv_norm="batch", conv_norm_statistics="per_depth").eval())


def check_prefixes(encoder):
    x, lengths = torch.randn(3, 11, 16), torch.tensor([11, 7, 2])
    out, _, states = encoder(x, lengths, return_hidden_states=True)
    assert len(states) == 5
    assert torch.equal(states[4], out)
    for k in range(1, 5):
        shallow, shallow_lengths, prefix = encoder(x, lengths, depth=k, return_hidden_states=True)
        assert torch.equal(shallow, states[k])
        assert torch.equal(encoder(x, lengths, depth=k)[0], states[k])
        assert torch.equal(shallow_lengths, lengths)
        assert len(prefix) == k + 1
        # and depth matters
        assert not torch.equal(states[k], states[k - 1])


def test_layer_map_is_what_runs():
    """The loop against its layers applied by hand."""
    encoder = make_encoder(sharing=(0, 1, 1, 0)).eval()
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    h = x.clone()
    h[1, 4:] = 0
    for index in (0, 1, 1, 0):
        h = encoder.layers[index](h, lengths)
    assert len(encoder.layers) == 2
    with engine("modules"):
        assert torch.equal(encoder(x, lengths)[0], h)


@pytest.mark.parametrize("name", ["modules", "loop"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_left_out_are_as_if_they_were_not_there(name, checkpointing):
    encoder = make_encoder(sharing="none").train()
    fewer = make_encoder(sharing="none", num_layers=2).train()
    kept = (1, 3)
    for mine, its in zip(fewer.layers, kept):
        mine.load_state_dict(encoder.layers[its].state_dict())
    encoder.gradient_checkpointing = checkpointing
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    with engine(name):
        with encoder.only(kept):
            out = encoder(x, lengths, depth=2)[0]
            out.square().sum().backward()
        expected = fewer(x, lengths)[0]
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        for mine, its in zip(fewer.layers, kept):
            for one, other in zip(mine.parameters(), encoder.layers[its].parameters()):
                torch.testing.assert_close(other.grad, one.grad)
        assert all(p.grad is None for k in (0, 2) for p in encoder.layers[k].parameters())
        # and afterwards all of them are there
        assert encoder.layer_map == (0, 1, 2, 3)


def test_what_cannot_be_left_out():
    encoder = make_encoder(sharing="none").train()
    for wrong in ((), (4,), (-1,), (1, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"expected some of 0 \.\.\. 3, rising"), encoder.only(wrong):
            pass
    with pytest.raises(RuntimeError, match="boom"), encoder.only((0,)):
        raise RuntimeError("boom")
    assert encoder.layer_map == (0, 1, 2, 3)
    for changes in ({"sharing": "cycle:2"}, {"sharing": "none", "conditioning": ("step",)}):
        with pytest.raises(ValueError, match="only layers of their own"), make_encoder(**changes).train().only((0,)):
            pass
    with pytest.raises(ValueError, match="in training alone"), encoder.eval().only((0,)):
        pass


# padding


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", ["relative", "rotary", "none"])
@pytest.mark.parametrize("front_end", FRONT_ENDS, ids=lambda f: f.get("subsampling", f"input_dim={f.get('input_dim')}"))
def test_batch_equals_single(norm, position, front_end):
    """Each utterance of a batch gets what it would get alone, whatever the padding holds, and the padding no gradient."""
    encoder = make_encoder(conv_norm=norm, position=position, sharing="cycle:2", **front_end)
    lengths = torch.tensor([21, 1, 13, 4])
    x = poisoned(torch.randn(4, 21, front_end.get("input_dim", 16)), lengths).requires_grad_()
    for training in (False, True) if norm != "batch" else (False,):
        encoder.train(training)
        out, out_lengths = encoder(x, lengths)
        assert torch.equal(out_lengths, encoder.subsampled_lengths(lengths))
        for i, n in enumerate(lengths.tolist()):
            m = int(out_lengths[i])
            alone = encoder(x[i : i + 1, :n])[0][0]
            assert alone.shape[0] == m
            torch.testing.assert_close(out[i, :m], alone, rtol=0, atol=1e-5)
        real = torch.arange(out.shape[1]) < out_lengths[:, None]
        (gradient,) = torch.autograd.grad(out[real].square().sum() + out[real].sum(), x)
        for i, n in enumerate(lengths.tolist()):
            assert gradient[i, :n].abs().sum() > 0
            assert gradient[i, n:].abs().sum() == 0


def test_padding_may_be_of_any_length():
    encoder = make_encoder(conv_norm="group").eval()
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 5])
    longer = torch.cat((x, torch.full((2, 30, 16), torch.inf)), 1)
    torch.testing.assert_close(encoder(longer, lengths)[0][:, :9], encoder(x, lengths)[0], rtol=0, atol=1e-5)


def test_lengths_none_means_all_frames():
    for norm in NORMS:
        encoder = make_encoder(conv_norm=norm).eval()
        x = torch.randn(2, 9, 16)
        out, lengths = encoder(x)
        assert lengths is None
        torch.testing.assert_close(out, encoder(x, torch.tensor([9, 9]))[0], rtol=0, atol=1e-6)


def test_int32_lengths():
    encoder = make_encoder(input_dim=10, subsampling="conv", subsampling_factor=4).eval()
    x, lengths = torch.randn(2, 9, 10), torch.tensor([9, 5])
    assert torch.equal(encoder(x, lengths.int())[0], encoder(x, lengths)[0])


def test_batch_norm_takes_real_frames_only():
    """Statistics of a padded batch are those of the real frames laid end to end, however much padding there is."""
    layer = make_encoder(torch.float64, num_layers=1, conv_norm="batch")
    seen = []
    conv = layer.layers[0].conv.depthwise
    x, lengths = torch.randn(3, 12, 16, dtype=torch.float64), torch.tensor([12, 5, 1])
    reference = copy.deepcopy(layer)
    for i, n in enumerate(lengths.tolist()):
        # a single utterance has no padding: its convolution output, before the norm
        module = reference.layers[0]
        h = module.ffn1(x[i : i + 1, :n])
        h = h + module.attention(module.attention.norm(h), None, module.positions(h))
        y = nn.functional.glu(module.conv.pointwise1(module.conv.norm(h)), -1).transpose(1, 2)
        seen.append(nn.functional.conv1d(y, conv.weight, conv.bias, padding=2, groups=16)[0].T)
    frames = torch.cat(seen)
    norm = layer.layers[0].conv.depthwise_norm
    want_mean = 0.9 * norm.running_mean + 0.1 * frames.mean(0)
    want_var = 0.9 * norm.running_var + 0.1 * frames.var(0, unbiased=True)
    for extra in (0, 7):
        trained = copy.deepcopy(layer).train()
        padded = torch.cat((x, torch.randn(3, extra, 16, dtype=torch.float64)), 1)
        trained(poisoned(padded, lengths), lengths)
        norm = trained.layers[0].conv.depthwise_norm
        torch.testing.assert_close(norm.running_mean, want_mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(norm.running_var, want_var, rtol=0, atol=1e-10)


def test_batch_norm_statistics_per_depth():
    """Each depth keeps its own; together they make a shared layer behave as N layers with statistics of their own."""
    encoder = make_encoder(torch.float64, conv_norm="batch", conv_norm_statistics="per_depth").train()
    unshared = make_encoder(torch.float64, conv_norm="batch", sharing="none").train()
    for k, layer in enumerate(unshared.layers):
        layer.load_state_dict(encoder.layers[0].state_dict())
        layer.conv.depthwise_norm.running_mean.copy_(encoder.running_mean[k])
        layer.conv.depthwise_norm.running_var.copy_(encoder.running_var[k])
    x, lengths = torch.randn(2, 9, 16, dtype=torch.float64), torch.tensor([9, 4])
    before = encoder.running_mean.clone()
    for depth in (4, 2, 3):
        torch.testing.assert_close(encoder(x, lengths, depth=depth)[0], unshared(x, lengths, depth=depth)[0])
    for k, layer in enumerate(unshared.layers):
        torch.testing.assert_close(encoder.running_mean[k], layer.conv.depthwise_norm.running_mean)
        torch.testing.assert_close(encoder.running_var[k], layer.conv.depthwise_norm.running_var)
        assert not torch.equal(encoder.running_mean[k], before[k])
    encoder.eval(), unshared.eval()
    torch.testing.assert_close(encoder(x, lengths)[0], unshared(x, lengths)[0])


# adaptive depth


def exits_by_definition(encoder, x, lengths, kind, min_depth):
    """``(rule, exit depths [B], hidden states)`` from the full run, at the threshold that tells most utterances apart."""
    with torch.no_grad():
        states = encoder(x, lengths, return_hidden_states=True)[2]
    n = encoder.config.num_layers
    distances = torch.stack([ExitRule(kind).distance(states[k], states[k - 1], lengths) for k in range(1, n + 1)])
    best = None
    for threshold in distances.flatten().mul(1.0001).tolist():
        exits = torch.full((x.shape[0],), n)
        for k in range(n - 1, min_depth - 1, -1):
            exits[distances[k - 1] < threshold] = k
        if best is None or len(exits.unique()) > len(best[1].unique()):
            best = ExitRule(kind, threshold=threshold, min_depth=min_depth), exits
    assert len(best[1].unique()) >= 3
    return *best, states


@pytest.mark.parametrize("kind", ["change", "cosine"])
@pytest.mark.parametrize("norm", ["layer", "batch", "group"])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_adaptive(kind, norm, with_lengths):
    """Every utterance leaves where the rule says so on the full run, with the hidden state of that depth."""
    encoder = make_encoder(conv_norm=norm, num_layers=6, input_dim=10).eval()
    x = torch.randn(7, 13, 10) * torch.logspace(-2, 1, 7)[:, None, None]
    lengths = torch.tensor([13, 6, 1, 9, 2, 13, 5]) if with_lengths else None
    rule, want, states = exits_by_definition(encoder, x, lengths, kind, 2)
    out, out_lengths, exits = encoder.adaptive(x, lengths, rule)
    assert torch.equal(exits, want)
    assert exits.dtype == torch.int64
    assert out_lengths is lengths or torch.equal(out_lengths, lengths)
    for i, k in enumerate(exits.tolist()):
        n = 13 if lengths is None else int(lengths[i])
        torch.testing.assert_close(out[i, :n], states[k][i, :n], rtol=0, atol=1e-5)


def test_adaptive_extremes():
    encoder = make_encoder().eval()
    x, lengths = torch.randn(3, 9, 16), torch.tensor([9, 5, 2])
    with engine("modules"):
        states = encoder(x, lengths, return_hidden_states=True)[2]
    for rule, depth in (
        (ExitRule("change", threshold=1e9), 1),
        (ExitRule("cosine", threshold=1e9, min_depth=3), 3),
        (ExitRule("change", threshold=1e-9), 4),
        (ExitRule("change", threshold=1e-9, depth=2), 2),
        (ExitRule("fixed", depth=3), 3),
    ):
        out, _, exits = encoder.adaptive(x, lengths, rule)
        assert exits.tolist() == [depth] * 3
        assert torch.equal(out, states[depth])
    with pytest.raises(ValueError, match="depth is 5; expected an integer from 1 to num_layers = 4"):
        encoder.adaptive(x, lengths, ExitRule(depth=5))


def test_adaptive_shrinks_the_batch():
    """Finished utterances cost nothing: the layer sees as many rows as are still running."""
    encoder = make_encoder(num_layers=6).eval()
    x = torch.randn(5, 9, 16) * torch.logspace(-2, 1, 5)[:, None, None]
    rows = []
    encoder.layers[0].register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[0]))
    rule, _, _ = exits_by_definition(encoder, x, None, "change", 1)
    rows.clear()
    _, _, exits = encoder.adaptive(x, None, rule)
    assert rows == [int((exits >= k).sum()) for k in range(1, int(exits.max()) + 1)]
    assert rows[-1] < 5


def test_adaptive_does_not_track_gradients():
    out, _, _ = make_encoder().adaptive(torch.randn(1, 5, 16), None, ExitRule(depth=2))
    assert not out.requires_grad


# accounting


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("conditioning", [(), ("film", "lora")], ids=str)
def test_parameter_counts(sharing, conditioning):
    encoder = ConformerEncoder(BASE.replace(sharing=sharing, conditioning=conditioning, input_dim=10))
    unshared = ConformerEncoder(BASE.replace(sharing="none", conditioning=conditioning, input_dim=10))
    summary = encoder.summary()
    assert summary.unique == sum(p.numel() for p in encoder.parameters())
    assert summary.effective == sum(p.numel() for p in unshared.parameters())
    assert summary.per_layer == sum(p.numel() for p in ConformerLayer(BASE).parameters())
    assert summary.ratio == summary.effective / summary.unique


def test_parameter_ratio_of_the_paper():
    """Sharing one layer among N divides the parameters of the stack by N."""
    for n in (1, 6, 12, 24):
        assert ConformerEncoder(BASE.replace(num_layers=n)).summary().ratio == n
    # with a front end of f parameters: (f + N p) / (f + p)
    summary = ConformerEncoder(BASE.replace(num_layers=12, input_dim=80)).summary()
    front, layer = 80 * 16 + 16, summary.per_layer
    assert summary.ratio == (front + 12 * layer) / (front + layer)


@pytest.mark.parametrize("position", ["relative", "rotary", "none"])
@pytest.mark.parametrize("sharing", ["all", "none"])
def test_flops(position, sharing):
    """Against PyTorch's own counter on a run of each depth, of the references: it cannot look into fused kernels."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make_encoder(position=position, sharing=sharing).eval()
    frames = 13
    flops = encoder.summary(frames).flops
    for depth in range(1, 5):
        with backend("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.randn(1, frames, 16), depth=depth)
        # the reference forms the scores of all 2T-1 positions of a row, of which T are wanted and counted
        unused = depth * 2 * frames * (frames - 1) * 16 if position == "relative" else 0
        assert flops[depth - 1] == counter.get_total_flops() - unused


@pytest.mark.parametrize("changes", FRONT_ENDS, ids=str)
def test_flops_of_the_front_end(changes):
    """Against PyTorch's own counter, on input that fills the last frame."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make_encoder(position="none", **changes).eval()
    frames, config = 7, encoder.config
    summary = encoder.summary(frames)
    x = torch.randn(1, frames * config.subsampling_factor, config.input_dim or config.d_model)
    front_end = 0
    if encoder.front_end is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.front_end(x, None)
        front_end = counter.get_total_flops()
    with backend("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(x)
    assert summary.front_end_flops == front_end
    assert summary.flops[-1] == counter.get_total_flops()


def test_summary_reads_well():
    text = str(ConformerEncoder(BASE.replace(num_layers=3)).summary(100))
    assert "(3.00x)" in text
    assert text.splitlines()[3] == "depth   GFLOP for 100 frames"
    assert len(text.splitlines()) == 7
    text = str(ConformerEncoder(BASE.replace(num_layers=1, input_dim=500)).summary(1000))
    assert text.splitlines()[3] == "depth   GFLOP for 1000 frames (front end 0.016)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "4 loops of 1 layer, sharing='all'"),
        ({"sharing": "cycle:2"}, "4 loops of 2 layers, sharing='cycle:2'"),
        ({"num_layers": 1, "sharing": "none"}, "1 loop of 1 layer, sharing='none'"),
    ],
    ids=str,
)
def test_printing_says_how_many_loops(changes, said):
    assert said in repr(ConformerEncoder(BASE.replace(**changes))).splitlines()[1]


# state


@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_state_dict_holds_no_more_than_tensors(tmp_path, conv_norm):
    """Through safetensors and back: a file that can hold nothing but tensors."""
    from safetensors.torch import load_file, save_file

    statistics = "per_depth" if conv_norm == "batch" else "shared"
    changes = {"conv_norm": conv_norm, "conv_norm_statistics": statistics, "input_dim": 10, "conditioning": ("lora",)}
    encoder = make_encoder(**changes).eval()
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    again = ConformerEncoder(encoder.config).eval()
    again.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    x = torch.randn(2, 9, 10)
    assert torch.equal(again(x)[0], encoder(x)[0])


def test_deepcopy_is_independent():
    encoder = make_encoder(conditioning=("film",)).eval()
    clone = copy.deepcopy(encoder)
    x = torch.randn(1, 9, 16)
    want = encoder(x)[0]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert torch.equal(clone(x)[0], want)


def test_float64():
    encoder = make_encoder(conditioning=("film", "lora"), input_dim=10).eval()
    x, lengths = torch.randn(2, 9, 10), torch.tensor([9, 5])
    exact = copy.deepcopy(encoder).double()(x.double(), lengths)[0]
    assert exact.dtype == torch.float64
    torch.testing.assert_close(encoder(x, lengths)[0].double(), exact, rtol=0, atol=1e-5)


# input that does not fit


@pytest.mark.parametrize(
    ("x", "lengths", "depth", "message"),
    [
        (torch.zeros(2, 9, 16), None, 0, r"depth is 0; expected an integer from 1 to num_layers = 4"),
        (torch.zeros(2, 9, 16), None, 5, r"depth is 5; expected an integer"),
        (torch.zeros(2, 9, 16), None, True, r"depth is True; expected an integer"),
        (torch.zeros(2, 9, 16), None, 2.0, r"depth is 2\.0; expected an integer"),
        (torch.zeros(9, 16), None, None, r"input has shape \[9, 16\]; expected \[B, T, 16\]"),
        (torch.zeros(2, 16, 9), None, None, r"input has shape \[2, 16, 9\]; expected \[B, T, 16\]"),
        (torch.zeros(2, 9, 16, dtype=torch.int64), None, None, r"input has dtype torch\.int64; expected a floating"),
        (torch.zeros(2, 9, 16), torch.tensor([9]), None, r"lengths has shape \[1\]; expected \[B\] = \[2\]"),
        (torch.zeros(2, 9, 16), torch.tensor([9, 10]), None, r"lengths span 9 \.\.\. 10; expected values from 0 to T = 9"),
        (torch.zeros(2, 9, 16), torch.tensor([9, -1]), None, r"lengths span -1 \.\.\. 9"),
        (torch.zeros(2, 9, 16), torch.tensor([9.0, 1.0]), None, r"lengths has dtype torch\.float32; expected int64"),
        ([[1.0]], None, None, "input is a list; expected a tensor"),
        (np.zeros((2, 9, 16), np.float32), None, None, "input is a ndarray; expected a tensor"),
        (torch.zeros(2, 9, 16), [9, 9], None, "lengths is a list; expected a tensor"),
    ],
)  # fmt: skip
def test_bad_input(x, lengths, depth, message):
    with pytest.raises(ValueError, match=r"ConformerEncoder: .*" + message):
        make_encoder()(x, lengths, depth=depth)


def test_empty_batch_and_single_frame():
    for changes in ({}, {"conv_norm": "batch"}, {"conv_norm": "group"}, {"position": "rotary"}):
        encoder = make_encoder(**changes).eval()
        assert encoder(torch.zeros(0, 5, 16), torch.zeros(0, dtype=torch.int64))[0].shape == (0, 5, 16)
        assert encoder(torch.randn(1, 1, 16), torch.tensor([1]))[0].isfinite().all()


@pytest.mark.parametrize("kind", ["none", "stack", "conv"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 0])], ids=str)
def test_no_frames_through_a_front_end(kind, lengths):
    encoder = make_encoder(input_dim=10, subsampling=kind, subsampling_factor=1 if kind == "none" else 4)
    x = torch.zeros(2, 0, 10, requires_grad=True)
    out, out_lengths = encoder(x, lengths)
    assert out.shape == (2, 0, 16)
    assert lengths is None or out_lengths.tolist() == [0, 0]
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_engine_and_modules_agree_on_what_overflows(norm, dtype):
    """Finite or not: a norm whose variance overflows does not pass its input off as constant."""
    encoder = make_encoder(conv_norm=norm).eval().to(dtype)
    for scale in (1.0, 1e10, 1e18, 1e20, 1e30, 1e38):
        x = (torch.randn(1, 7, 16) * scale).to(dtype)
        with torch.no_grad():
            out = encoder(x)[0]
            with engine("modules"):
                want = encoder(x)[0]
        assert torch.equal(out.isfinite(), want.isfinite()), scale


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 5, 16)])
def test_nothing_in_nothing_out(shape):
    encoder = ConformerEncoder(ConformerConfig(d_model=16, num_heads=2, num_layers=2, ffn_dim=32, conv_kernel_size=3))
    x = torch.randn(shape, requires_grad=True)
    out, _ = encoder(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
    with torch.no_grad():
        assert encoder.eval()(x)[0].shape == shape
