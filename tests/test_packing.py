"""Packed batches equal padded ones: outputs, gradients, statistics, on every engine."""

from __future__ import annotations

import copy

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine, loop, pack, unpack
from lcconformer.packing import Packing

from .conftest import with_random_values

BASE = ConformerConfig(
    d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, dropout=0.0, conv_norm_groups=2
)
LENGTHS = torch.tensor([9, 1, 0, 4, 6])
CONFIGS = {
    **{norm: {"conv_norm": norm} for norm in ("layer", "batch", "group", "none")},
    "convolution first": {"convolution_first": True},
    "rotary": {"position": "rotary"},
    "rotary hidden": {"position": "rotary", "rotary_input": "hidden"},
    "no positions": {"position": "none"},
    "conditioned": {"conditioning": ("layer_norm", "step", "film", "lora")},
    "statistics per depth": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    "unshared": {"sharing": "none"},
    "projected": {"input_dim": 10},
    "stacked": {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 3},
    "convolved": {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 4},
}


def make_encoder(dtype=torch.float64, **changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).to(dtype)
    with_random_values(encoder)
    return encoder


def batch(encoder, lengths=LENGTHS):
    """Input ``[B, T, C]`` with NaN in the padding."""
    x = torch.randn(len(lengths), 9, encoder.config.input_dim or 16, dtype=next(encoder.parameters()).dtype)
    for row, n in zip(x, lengths.tolist()):
        row[n:] = torch.nan
    return x


def padded_run(encoder, x, lengths, **options):
    """(hidden states, lengths of them) of a padded batch, packed afterwards."""
    _, out_lengths, states = encoder(x, lengths, return_hidden_states=True, **options)
    return [pack(h, out_lengths)[0] for h in states], out_lengths


def packed_run(encoder, x, lengths, **options):
    _, ends, states = encoder.packed(*pack(x, lengths), return_hidden_states=True, **options)
    return states, ends.diff()


def loss_of(states):
    return sum((h * (torch.arange(h.numel()) * i).sin().view(h.shape)).sum() for i, h in enumerate(states, 1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_modules_equal_the_padded_run(changes, training):
    """Outputs at every depth, gradients of everything, and running statistics, in float64."""
    encoder = make_encoder(**changes).train(training)
    check_equal(encoder, "modules")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["layer", "batch", "group", "none", "convolution first", "unshared"])
def test_training_engine_equals_the_padded_run(name, checkpointing):
    encoder = make_encoder(**CONFIGS[name])
    encoder.gradient_checkpointing = checkpointing
    check_equal(encoder, "loop")


def check_equal(encoder, name):
    x = batch(encoder)
    results = []
    for run, run_on in ((padded_run, "modules"), (packed_run, name)):
        own, given = copy.deepcopy(encoder), x.clone().requires_grad_()
        with engine(run_on):
            states, lengths = run(own, given, LENGTHS)
        loss_of(states[1:]).backward()
        gradients = {n: p.grad for n, p in own.named_parameters()} | {"x": given.grad}
        results.append((states, lengths, gradients, dict(own.named_buffers())))
    (want, want_lengths, want_gradients, want_buffers), (got, lengths, gradients, buffers) = results
    assert torch.equal(lengths, want_lengths.to(lengths.dtype))
    assert len(got) == len(want) == 5
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)
    scale = max(g.abs().max().item() for g in want_gradients.values())
    for key, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-9, atol=1e-11 * scale)
    for key, buffer in want_buffers.items():
        torch.testing.assert_close(buffers[key], buffer, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["layer", "batch", "group", "none", "convolution first", "no positions", "conditioned"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_give_the_bits_of_the_padded_run(name, dtype):
    encoder = make_encoder(dtype, **CONFIGS[name]).eval()
    x = batch(encoder)
    with torch.no_grad(), engine("loop"):
        want, _ = padded_run(encoder, x, LENGTHS)
        got, _ = packed_run(encoder, x, LENGTHS)
        shallow, _ = encoder.packed(*pack(x, LENGTHS), depth=2)
    for g, w in zip(got, want):
        assert torch.equal(g, w)
    assert torch.equal(shallow, got[2])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend_name", ["triton", "cpu", "torch"])
def test_kernels(backend_name, training, assert_close):
    """Float32 by the tolerance rule, on each backend of the ops."""
    lengths = torch.tensor([3, 9, 5])
    exact = make_encoder(num_layers=1, conv_norm="batch").train(training)
    encoder = copy.deepcopy(exact).float()
    x = batch(encoder, lengths)
    with engine("modules"):
        with backend("torch"):
            ref, _ = padded_run(exact, x.double(), lengths)
            low, _ = padded_run(copy.deepcopy(encoder), x, lengths)
        with backend(backend_name):
            got, _ = packed_run(encoder, x, lengths)
    for i, (out, exactly, plain) in enumerate(zip(got, ref, low)):
        assert_close(f"hidden state {i}", out.detach(), exactly.detach(), plain.detach(), 2)


def test_utterances_do_not_see_one_another():
    """Another neighbour changes no bit, whatever the engine."""
    encoder = make_encoder(torch.float32).eval()
    x, ends = torch.randn(13, 16), torch.tensor([0, 4, 13], dtype=torch.int32)
    # the packed weights keep even values apart that are not finite
    for name, other in (("modules", 1e3), ("loop", torch.nan)):
        with torch.no_grad(), engine(name):
            first, _ = encoder.packed(x, ends)
            second, _ = encoder.packed(torch.cat((x[:4], torch.full((9, 16), other))), ends)
        assert torch.equal(first[:4], second[:4])
        assert not torch.equal(first[4:], second[4:])


def test_dropout_drops_and_comes_back():
    encoder = make_encoder(torch.float32, dropout=0.5)
    x, ends = pack(batch(encoder), LENGTHS)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(encoder.packed(x, ends)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_truncated_backpropagation():
    encoder = make_encoder()
    x, ends = pack(batch(encoder), LENGTHS)
    for name in ("modules", "loop"):
        given = x.clone().requires_grad_()
        with engine(name):
            encoder.packed(given, ends, backprop_depth=2)[0].square().sum().backward()
        assert given.grad is None


def test_peer_padding_is_no_padding():
    """Without padding there is nothing for a peer to leak: each utterance gets what it gets alone."""
    encoder = make_encoder(torch.float32, padding="peer", conv_norm="batch").eval()
    x, lengths = batch(encoder), torch.tensor([9, 4])
    packed, ends = pack(x[[0, 3]], lengths)
    for name in ("modules", "loop"):
        with torch.no_grad(), engine(name):
            out, _ = encoder.packed(packed, ends)
            for row, first, n in ((0, 0, 9), (3, 9, 4)):
                alone, _ = encoder(x[row : row + 1, :n])
                torch.testing.assert_close(out[first : first + n], alone[0], rtol=0, atol=1e-5)
    merging = make_encoder(padding="peer", input_dim=10, subsampling="stack", subsampling_factor=2)
    with pytest.raises(NotImplementedError, match="sees padding"):
        merging.packed(torch.randn(4, 10, dtype=torch.float64), torch.tensor([0, 4]))


def test_longest_may_be_given_and_larger():
    encoder = make_encoder(torch.float32).eval()
    x, ends = pack(batch(encoder), LENGTHS)
    with torch.no_grad():
        want, _ = encoder.packed(x, ends)
        for name in ("modules", "loop"):
            with engine(name):
                torch.testing.assert_close(encoder.packed(x, ends, longest=20)[0], want, rtol=0, atol=1e-5)


def test_replaced_modules_are_called():
    """A hooked convolution sees utterances apart from one another."""
    encoder = make_encoder().eval()
    x = batch(encoder)
    want, _ = padded_run(encoder, x, LENGTHS)
    seen = []
    for module in (encoder.layers[0].conv.depthwise, encoder.layers[0].conv.depthwise_norm):
        module.register_forward_hook(lambda *a: seen.append(1))
    got, _ = packed_run(encoder, x, LENGTHS)
    assert len(seen) == 8
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)


def test_compiles():
    encoder = make_encoder(torch.float32, num_layers=1).eval()
    x, ends = pack(batch(encoder), LENGTHS)
    run = torch.compile(lambda x, ends: encoder.packed(x, ends, longest=9)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x, ends), encoder.packed(x, ends)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("utterances", [0, 2])
@pytest.mark.parametrize("name", ["layer", "rotary", "stacked", "convolved"])
def test_no_frames(name, utterances):
    encoder = make_encoder(**CONFIGS[name])
    x = torch.zeros(0, encoder.config.input_dim or 16, dtype=torch.float64)
    out, ends = encoder.packed(x, torch.zeros(utterances + 1, dtype=torch.int64))
    assert out.shape == (0, 16)
    assert ends.tolist() == [0] * (utterances + 1)


def test_explain(monkeypatch):
    encoder = make_encoder(torch.float32)
    x, ends = pack(batch(encoder), LENGTHS)
    assert encoder.explain(x, cu_seqlens=ends).engine == "training"
    # a graph has one shape: training as graphs leaves packed batches to the engine itself
    monkeypatch.setattr(loop.captured, "wanted", lambda x: True)
    monkeypatch.setattr(loop.captured, "run", None)
    encoder.packed(x, ends)[0].sum().backward()
    with torch.no_grad():
        found = encoder.eval().explain(x, cu_seqlens=ends)
    assert (found.engine, found.ops["shared_loop"].backend) == ("inference", "cpu")
    with pytest.raises(ValueError, match="cu_seqlens alone"):
        encoder.explain(x, LENGTHS, cu_seqlens=ends)


def test_pack_and_unpack_are_inverse():
    x = torch.randn(5, 9, 3, requires_grad=True)
    packed, ends = pack(x, LENGTHS)
    assert packed.shape == (20, 3)
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 9, 10, 10, 14, 20]
    assert torch.equal(packed[10:14], x[3, :4])
    again = unpack(packed, ends)
    real = (torch.arange(9) < LENGTHS[:, None])[..., None]
    assert torch.equal(again, x.masked_fill(~real, 0.0))
    assert torch.equal(unpack(packed, ends, 12)[:, :9], again)
    again.sum().backward()
    assert torch.equal(x.grad, real.expand_as(x).float())


def test_layouts_are_disjoint():
    packing = Packing.of(torch.tensor([0, 3, 3, 5]), 5, 3)
    assert packing.utterance.tolist() == [0, 0, 0, 2, 2]
    assert packing.frame.tolist() == [0, 1, 2, 0, 1]
    assert packing.padded().rows.tolist() == [0, 1, 2, 6, 7]
    # the empty utterance has a gap of its own
    assert packing.apart(2).rows.tolist() == [0, 1, 2, 7, 8]
    assert packing.apart(2).frames == 9


BAD = {
    "flat": (lambda x, ends: (x[0], ends), r"input has shape \[16\]; expected \[total, 16\]"),
    "integers": (lambda x, ends: (x.long(), ends), "input has dtype torch.int64"),
    "list": (lambda x, ends: (x, [0, 20]), "cu_seqlens is a list"),
    "float ends": (lambda x, ends: (x, ends.float()), "cu_seqlens has dtype torch.float32"),
    "no ends": (lambda x, ends: (x, ends[:0]), r"cu_seqlens has shape \[0\]"),
    "short": (lambda x, ends: (x, ends[:-1]), "expected numbers that rise from 0 to total = 20"),
    "falling": (lambda x, ends: (x, torch.tensor([0, 12, 9, 20])), "expected numbers that rise"),
    "elsewhere": (lambda x, ends: (x, ends.to("meta")), "cu_seqlens is on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    encoder = make_encoder(torch.float32)
    x, ends = pack(batch(encoder), LENGTHS)
    with pytest.raises(ValueError, match=message):
        encoder.packed(*change(x, ends))


@pytest.mark.parametrize(("options", "message"), [({"longest": 8}, "has 9 frames"), ({"longest": -1}, "longest is -1")])
def test_bad_options(options, message):
    encoder = make_encoder(torch.float32)
    with pytest.raises(ValueError, match=message):
        encoder.packed(*pack(batch(encoder), LENGTHS), **options)
