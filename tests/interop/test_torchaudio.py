"""`Conformer` against torchaudio's own module: results, gradients, statistics and state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lcconformer import Conformer

from .peers import randomise

CASES = [
    # input_dim, num_heads, ffn_dim, num_layers, kernel, group norm, convolution first, frames, lengths
    (16, 4, 32, 2, 7, False, False, 13, (13, 9, 2)),
    (16, 2, 24, 1, 31, False, True, 17, (17, 17)),
    (15, 3, 7, 3, 1, True, False, 9, (9, 1)),
    (9, 1, 11, 2, 3, True, True, 31, (5, 31, 16)),
    (8, 8, 64, 1, 63, False, False, 65, (65, 40)),
    (24, 4, 48, 2, 5, False, False, 1, (1, 1, 1)),
]


def pair(torchaudio_conformer, case):
    """(theirs, ours) with the same weights, float32, and ``input, lengths``."""
    dim, heads, ffn, layers, kernel, group, first, frames, lengths = case
    theirs = torchaudio_conformer.Conformer(dim, heads, ffn, layers, kernel, 0.0, group, first)
    randomise(theirs)
    ours = Conformer(dim, heads, ffn, layers, kernel, 0.0, group, first)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(len(lengths), frames, dim), torch.tensor(lengths)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation(torchaudio_conformer, case):
    theirs, ours, x, lengths = pair(torchaudio_conformer, case)
    want, want_lengths = theirs.eval()(x, lengths)
    got, got_lengths = ours.eval()(x, lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got_lengths, want_lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32], ids=str)
def test_dtypes_of_lengths(torchaudio_conformer, dtype):
    """Fractions too: torchaudio compares them with the index of a frame."""
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[0])
    for given in (lengths.to(dtype), torch.tensor([13.5, 8.5, 2.25]).to(dtype)):
        want, _ = theirs.eval()(x, given)
        got, got_lengths = ours.eval()(x, given)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert got_lengths.dtype == dtype
        assert torch.equal(got_lengths, given)


@pytest.mark.parametrize("case", [c for c in CASES if c[-2] > 1], ids=str)
def test_training_step(torchaudio_conformer, case):
    """Output, all gradients and the running statistics, in training mode; gradients compared under torchaudio's names."""
    theirs, ours, x, lengths = pair(torchaudio_conformer, case)
    theirs.train(), ours.train()
    weight = torch.randn_like(x)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = theirs(inputs[0], lengths)[0], ours(inputs[1], lengths)[0]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    for out in outputs:
        (out * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)

    want = {name: p.grad for name, p in theirs.named_parameters()}
    # move our gradients through the same renaming as the weights
    carrier = copy.deepcopy(ours)
    with torch.no_grad():
        for p, q in zip(carrier.parameters(), ours.parameters()):
            p.copy_(q.grad)
    got = carrier.state_dict()
    assert want.keys() == {n for n in got if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_running_statistics_follow(torchaudio_conformer):
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[0])
    for _ in range(3):
        theirs.train()(x, lengths), ours.train()(x, lengths)
    want, got = theirs.state_dict(), ours.state_dict()
    statistics = [n for n in want if "running" in n or "num_batches" in n]
    assert len(statistics) == 6
    for name in statistics:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
    assert got["conformer_layers.0.conv_module.sequential.3.num_batches_tracked"] == 8


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_state_dict_both_ways(torchaudio_conformer, case):
    theirs, ours, _, _ = pair(torchaudio_conformer, case)
    want, got = theirs.state_dict(), ours.state_dict()
    assert set(got) == set(want)
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert torch.equal(got[name], want[name]), name
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


def test_state_dict_of_a_larger_model(torchaudio_conformer):
    """The names carry the prefix of the module that holds the encoder, and its own keys are untouched."""
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[0])
    model = nn.ModuleDict({"encoder": Conformer(16, 4, 32, 2, 7), "head": nn.Linear(16, 3)})
    peer = nn.ModuleDict({"encoder": theirs, "head": nn.Linear(16, 3)})
    assert set(model.state_dict()) == set(peer.state_dict())
    model.load_state_dict(peer.state_dict())
    assert torch.equal(model["head"].weight, peer["head"].weight)
    assert torch.equal(model["encoder"].eval()(x, lengths)[0], ours.eval()(x, lengths)[0])


def test_load_with_assign(torchaudio_conformer):
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[0])
    with torch.device("meta"):
        empty = Conformer(16, 4, 32, 2, 7)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x, lengths)[0], ours.eval()(x, lengths)[0])


def test_load_leaves_the_given_dict_alone(torchaudio_conformer):
    theirs, ours, _, _ = pair(torchaudio_conformer, CASES[0])
    state = dict(theirs.state_dict())
    names = list(state)
    ours.load_state_dict(state)
    assert list(state) == names


def test_missing_and_unexpected_keys_have_torchaudio_names(torchaudio_conformer):
    theirs, ours, _, _ = pair(torchaudio_conformer, CASES[0])
    state = theirs.state_dict()
    del state["conformer_layers.1.self_attn.in_proj_weight"]
    state["conformer_layers.0.extra"] = torch.zeros(1)
    result = ours.load_state_dict(state, strict=False)
    assert result.missing_keys == ["conformer_layers.1.self_attn.in_proj_weight"]
    assert result.unexpected_keys == ["conformer_layers.0.extra"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"conformer_layers\.1\.self_attn\.in_proj_weight"'):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*ffn1"):
        Conformer(16, 4, 33, 2, 7).load_state_dict(theirs.state_dict())


def test_copies_keep_the_names(torchaudio_conformer):
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[0])
    clone = copy.deepcopy(ours)
    randomise(ours)
    clone.load_state_dict(theirs.state_dict())
    assert set(clone.state_dict()) == set(theirs.state_dict())
    want = theirs.eval()(x, lengths)[0]
    torch.testing.assert_close(clone.eval()(x, lengths)[0], want, rtol=0, atol=1e-5)


def test_shared_layers_are_the_layer_repeated(torchaudio_conformer):
    """One set of weights under ``conformer_layers.0``; the same as torchaudio's stack with that layer at every depth."""
    ours = Conformer(16, 4, 32, 3, 7, share_layers=True).eval()
    randomise(ours)
    state = ours.state_dict()
    assert {n.split(".")[1] for n in state} == {"0"}
    theirs = torchaudio_conformer.Conformer(16, 4, 32, 3, 7).eval()
    theirs.load_state_dict({n.replace(".0.", f".{i}.", 1): v for i in range(3) for n, v in state.items()})
    x, lengths = torch.randn(2, 11, 16), torch.tensor([11, 6])
    torch.testing.assert_close(ours(x, lengths)[0], theirs(x, lengths)[0], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) * 3 == sum(p.numel() for p in theirs.parameters())


def test_depth_runs_the_first_layers(torchaudio_conformer):
    theirs, ours, x, lengths = pair(torchaudio_conformer, CASES[2])
    theirs.conformer_layers = theirs.conformer_layers[:2]
    got = ours.eval()(x, lengths, depth=2)[0]
    torch.testing.assert_close(got, theirs.eval()(x, lengths)[0], rtol=0, atol=1e-5)


def test_masked_padding_makes_a_batch_equal_single_utterances(torchaudio_conformer):
    """The leak of torchaudio is real and gone with padding="masked"."""
    theirs, _, x, lengths = pair(torchaudio_conformer, CASES[0])
    ours = Conformer(16, 4, 32, 2, 7, padding="masked").eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.eval()
    batch, peer_batch = ours(x, lengths)[0], theirs(x, lengths)[0]
    for i, n in enumerate(lengths.tolist()):
        alone = ours(x[i : i + 1, :n], lengths[i : i + 1])[0][0]
        torch.testing.assert_close(batch[i, :n], alone, rtol=0, atol=1e-5)
        # alone there is no padding to leak, so both agree
        peer_alone = theirs(x[i : i + 1, :n], lengths[i : i + 1])[0][0]
        torch.testing.assert_close(alone, peer_alone, rtol=0, atol=1e-5)
        if n < x.shape[1]:
            assert (peer_batch[i, :n] - peer_alone).abs().max() > 1e-3


def test_exports_with_dynamic_frames():
    """As torchaudio's cannot, which reads the longest length on the host."""
    ours = Conformer(16, 4, 32, 2, 7).eval()
    frames = torch.export.Dim("T", min=3, max=512)
    inputs = torch.randn(2, 13, 16), torch.tensor([13, 5])
    program = torch.export.export(ours, inputs, dynamic_shapes={"input": {1: frames}, "lengths": None}).module()
    x, lengths = torch.randn(2, 31, 16), torch.tensor([20, 5])
    torch.testing.assert_close(program(x, lengths)[0], ours(x, lengths)[0])


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_dropout_is_applied_in_training_only(group, first):
    ours = Conformer(16, 4, 32, 2, 7, 0.5, group, first)
    x, lengths = torch.randn(2, 11, 16), torch.tensor([11, 6])
    assert not torch.equal(ours.train()(x, lengths)[0], ours(x, lengths)[0])
    ours.eval()
    assert torch.equal(ours(x, lengths)[0], ours(x, lengths)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depthwise_conv_kernel_size": 4}, r"conv_kernel_size is 4; expected an odd integer"),
        ({"num_heads": 3}, r"num_heads is 3; expected a divisor of d_model = 16"),
        ({"num_layers": 0}, r"num_layers is 0; expected a positive integer"),
        ({"padding": "zero"}, r"padding is 'zero'; expected one of 'masked', 'peer'"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"input_dim": 16, "num_heads": 4, "ffn_dim": 32, "num_layers": 2, "depthwise_conv_kernel_size": 7}
    with pytest.raises(ValueError, match=message):
        Conformer(**{**arguments, **changes})


def test_bad_input():
    ours = Conformer(16, 4, 32, 2, 7)
    with pytest.raises(ValueError, match=r"input has shape \[2, 5, 15\]; expected \[B, T, 16\]"):
        ours(torch.randn(2, 5, 15), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=r"lengths span 1 \.\.\. 6; expected values from 0 to T = 5"):
        ours(torch.randn(2, 5, 16), torch.tensor([1, 6]))
    with pytest.raises(ValueError, match=r"lengths span 1 \.\.\. 6; expected values from 0 to T = 5"):
        ours(torch.randn(2, 5, 16), torch.tensor([1.0, 6.0]))
    with pytest.raises(ValueError, match=r"lengths has dtype torch.int16; expected .*; pass lengths.long\(\)"):
        ours(torch.randn(2, 5, 16), torch.tensor([1, 5], dtype=torch.int16))
