"""The op feed_forward: reference, checks, registration, compilation, autocast, dispatch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lcconformer import ops
from lcconformer.ops.feed_forward import feed_forward_reference
from lcconformer.ops.registry import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")


def arguments(shape=(2, 5, 8), f=24, dtype=torch.float32, device=DEVICE):
    d = shape[-1]
    shapes = (shape, (d,), (d,), (f, d), (f,), (d, f), (d,))
    return [torch.randn(s, dtype=dtype, device=device) for s in shapes]


def test_reference():
    x, norm_weight, norm_bias, w1, b1, w2, b2 = args = arguments(dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight + norm_bias
    u = torch.einsum("btd,fd->btf", h, w1) + b1
    branch = torch.einsum("btf,df->btd", u / (1 + torch.exp(-u)), w2) + b2
    torch.testing.assert_close(ops.feed_forward(*args), x + branch / 2)
    torch.testing.assert_close(ops.feed_forward(*args, scale=1.0), x + branch)


def test_gradients_of_the_reference():
    inputs = [p.requires_grad_() for p in arguments((2, 2, 4), 5, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(feed_forward_reference, inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 8), r"x has shape \[5, 8\]; expected \[B, T, D\]"),
        ("w1", torch.zeros(24, 7), r"w1 has shape \[24, 7\]; expected \[F, D\] = \[\*, 8\]"),
        ("w2", torch.zeros(8, 23), r"w2 has shape \[8, 23\]; expected \[D, F\] = \[8, 24\]"),
        ("b1", torch.zeros(8), r"b1 has shape \[8\]; expected \[F\] = \[24\]"),
        ("b2", torch.zeros(24), r"b2 has shape \[24\]; expected \[D\] = \[8\]"),
        ("norm_weight", torch.zeros(9), r"norm_weight has shape \[9\]; expected \[D\] = \[8\]"),
        ("w2", torch.zeros(8, 24, dtype=torch.float16), "w2 has dtype torch.float16 but x has torch.float32"),
        ("w1", torch.zeros(24, 8, device="meta"), "w1 is on meta but x is on cpu"),
        ("norm_bias", torch.zeros(8, device="meta"), "norm_bias is on meta but x is on cpu"),
    ],
)
def test_bad_input(name, value, message):
    args = dict(zip(NAMES, arguments(device="cpu")))
    with pytest.raises(ValueError, match=message):
        ops.feed_forward(**args | {name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": -0.1}, "dropout_p is -0.1; expected 0 <= dropout_p < 1"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of silu"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ops.feed_forward(*arguments(), **options)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_batches(shape, name):
    with backend(name):
        assert ops.feed_forward(*arguments(shape)).shape == shape


def test_without_kernels_auto_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("LCCONFORMER_BACKEND", raising=False)
    args = arguments(device="cpu", dtype=torch.float64)
    assert torch.equal(ops.feed_forward(*args), feed_forward_reference(*args))


def test_triton_says_why_not():
    with backend("triton"):
        with pytest.raises(NotImplementedError, match="activation 'gelu' is not fused, only 'silu' is"):
            ops.feed_forward(*arguments(), activation="gelu")
        with pytest.raises(NotImplementedError, match=r"dtype torch\.float64 is not one of"):
            ops.feed_forward(*arguments(dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="a row is fused up to D = 8192, got D = 8193"):
            ops.feed_forward(*arguments((1, 1, 8193), 2))


@pytest.mark.parametrize("biases", [True, False])
def test_backends_agree(biases):
    args = [p.requires_grad_() for p in arguments()]
    inputs = args if biases else args[:4] + args[5:6]
    if not biases:
        args[4] = args[6] = None
    found = {}
    for name in ("torch", "triton"):
        with backend(name):
            out = ops.feed_forward(*args)
        found[name] = (out.detach(), *torch.autograd.grad(out.square().sum(), inputs))
    torch.testing.assert_close(found["triton"], found["torch"], atol=1e-4, rtol=1e-4)


def test_dropout_follows_the_generator():
    args = arguments((2, 9, 64), 128)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with backend("triton"):
            found.append(ops.feed_forward(*args, dropout_p=0.4))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_dropout_averages_to_no_dropout():
    """One frame repeated: the mean over independent masks is what the reference gives in evaluation."""
    args = arguments((1, 1, 16), 32)
    args[3:6] = (p * 0.2 for p in args[3:6])
    args[0] = args[0].expand(2, 500, 16)
    with backend("triton"):
        out = ops.feed_forward(*args, dropout_p=0.3)
    plain = feed_forward_reference(*(p.double() for p in args))[0, 0]
    spread = out.flatten(0, 1).std(0) / 1000**0.5
    assert ((out.flatten(0, 1).mean(0) - plain).abs() < 5 * spread).all()
    assert spread.min() > 0


def test_autocast_keeps_the_stream_wide():
    args = [p.requires_grad_() for p in arguments()]
    found = {}
    for name in ("torch", "triton"):
        with torch.autocast(DEVICE, torch.float16), backend(name):
            out = ops.feed_forward(*args)
        assert out.dtype == torch.float32
        grads = torch.autograd.grad(out.square().sum(), args)
        assert all(g.dtype == torch.float32 for g in grads)
        found[name] = (out.detach(), *grads)
    exact = feed_forward_reference(*args)
    exact = (exact.detach(), *torch.autograd.grad(exact.square().sum(), args))
    for ours, theirs, true in zip(found["triton"], found["torch"], exact):
        largest = true.abs().max()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-3 * largest


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(layout, dropout_p):
    args = arguments((2, 3, 16), 24)
    if layout == "permuted":
        args[0] = args[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        args[3], args[5] = (w.t().contiguous().t() for w in (args[3], args[5]))
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    options = (seed, 0.5, "silu", dropout_p, 1e-5)
    forward = torch.ops.lcconformer.feed_forward_fwd.default
    for save in (False, True):
        torch.library.opcheck(forward, (*args, *options, save))
    out, *saved = forward(*args, *options, True)
    backward = torch.ops.lcconformer.feed_forward_bwd.default
    torch.library.opcheck(backward, (out, *args, *options, *saved))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_whole_without_recompiling_over_t(name):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ops.feed_forward, fullgraph=True, dynamic=True, backend=count)
    for t in (5, 9, 12):
        args = [p.requires_grad_() for p in arguments((2, t, 8))]
        with backend(name):
            out = compiled(*args)
        grads = torch.autograd.grad(out.square().sum(), args)
        expected = feed_forward_reference(*args)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), args), atol=1e-3, rtol=1e-3)
    assert len(graphs) == 1


def test_compiles_with_dropout():
    compiled = torch.compile(ops.feed_forward, fullgraph=True, dynamic=True, backend="aot_eager")
    args = [p.requires_grad_() for p in arguments((2, 9, 64), 128)]
    with backend("triton"):
        first, second = compiled(*args, dropout_p=0.5), compiled(*args, dropout_p=0.5)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert args[3].grad.isfinite().all()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports_with_dynamic_t(name):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return ops.feed_forward(*args)

    frames = {1: torch.export.Dim("frames", min=3, max=4096)}
    with backend(name), torch.no_grad():
        program = torch.export.export(Module(), tuple(arguments()), dynamic_shapes=((frames, *[None] * 6),))
        again = arguments((2, 11, 8))
        torch.testing.assert_close(program.module()(*again), feed_forward_reference(*again), atol=1e-4, rtol=1e-4)


def test_checkpointing_repeats_the_dropout():
    args = [p.requires_grad_() for p in arguments((2, 9, 64), 32)]

    def call(*tensors):
        return ops.feed_forward(*tensors, dropout_p=0.5)

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        with backend("triton"):
            out = torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False) if checkpointed else call(*args)
            found.append(torch.autograd.grad(out.square().sum(), args))
    assert all(torch.equal(plain, again) for plain, again in zip(*found))


@pytest.mark.gpu
def test_dropout_is_fresh_at_every_replay():
    args = arguments((8, 64, 256), 1024)
    with torch.no_grad(), backend("triton"):
        ops.feed_forward(*args, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.feed_forward(*args, dropout_p=0.5)
        graph.replay()
        first = out.clone()
        graph.replay()
    assert not torch.equal(first, out)
