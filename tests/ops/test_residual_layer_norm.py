"""The op residual_layer_norm: reference, checks, registration, compilation, dispatch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lcconformer import ops
from lcconformer.ops.registry import backend
from lcconformer.ops.residual_layer_norm import residual_layer_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(shape=(2, 5, 8), dtype=torch.float32, device=DEVICE):
    d = shape[-1]
    return [torch.randn(s, dtype=dtype, device=device) for s in (shape, shape, d, d)]


def test_reference():
    x, y, weight, bias = arguments(dtype=torch.float64)
    s, n = ops.residual_layer_norm(x, y, weight, bias, alpha=0.25, eps=1e-3)
    torch.testing.assert_close(s, x + y / 4)
    centred = s - s.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(n, expected)


def test_gradients_of_the_reference():
    inputs = [p.requires_grad_() for p in arguments((2, 3, 4), torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda *a: residual_layer_norm_reference(*a, alpha=0.5), inputs)


def test_the_reference_drops_the_branch():
    x, y = torch.zeros(100, 50), torch.ones(100, 50)
    s, _ = residual_layer_norm_reference(x, y, torch.ones(50), torch.zeros(50), dropout_p=0.2)
    assert set(s.unique().tolist()) == {0.0, 1.25}


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.tensor(1.0), r"x has no dimensions; expected \[..., D\]"),
        (1, torch.zeros(2, 5, 7), r"y has shape \[2, 5, 7\]; expected \[..., D\] = \[2, 5, 8\]"),
        (1, torch.zeros(2, 5, 8, dtype=torch.float16), "y has dtype torch.float16 but x has torch.float32"),
        (1, torch.zeros(2, 5, 8, device="meta"), "y is on meta but x is on cpu"),
        (2, torch.zeros(7), r"weight has shape \[7\]; expected \[D\] = \[8\]"),
        (3, torch.zeros(8, device="meta"), "bias is on meta but x is on cpu"),
    ],
)
def test_bad_input(index, value, message):
    args = arguments(device="cpu")
    args[index] = value
    with pytest.raises(ValueError, match=message):
        ops.residual_layer_norm(*args)


def test_bad_dropout():
    with pytest.raises(ValueError, match=r"dropout_p is 1\.0; expected 0 <= dropout_p < 1"):
        ops.residual_layer_norm(*arguments(), dropout_p=1.0)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_batches(shape, name):
    with backend(name):
        s, n = ops.residual_layer_norm(*arguments(shape))
    assert s.shape == n.shape == shape


def test_without_kernels_auto_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("LCCONFORMER_BACKEND", raising=False)
    args = arguments(device="cpu", dtype=torch.float64)
    for ours, theirs in zip(ops.residual_layer_norm(*args), residual_layer_norm_reference(*args)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8193), torch.float32, "a row is fused up to D = 8192, got D = 8193"),
        ((1, 8), torch.float64, "dtype torch.float64 is not one of"),
    ],
)
def test_triton_says_why_not(shape, dtype, message):
    with backend("triton"), pytest.raises(NotImplementedError, match=message):
        ops.residual_layer_norm(*arguments(shape, dtype))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_backends_agree(alpha):
    args = [p.requires_grad_() for p in arguments()]
    found = {}
    for name in ("torch", "triton"):
        with backend(name):
            s, n = ops.residual_layer_norm(*args, alpha=alpha)
        grads = torch.autograd.grad(s.square().sum() + (n * n * n).sum(), args)
        only_n = torch.autograd.grad(ops.residual_layer_norm(*args, alpha=alpha)[1].square().sum(), args)
        found[name] = (s.detach(), n.detach(), *grads, *only_n)
    torch.testing.assert_close(found["triton"], found["torch"], atol=1e-4, rtol=1e-4)


def test_dropout_is_the_same_in_both_directions_and_follows_the_generator():
    x, y, weight, bias = arguments((3, 7, 64))
    y.requires_grad_()
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with backend("triton"):
            s, _ = ops.residual_layer_norm(x, y, weight, bias, dropout_p=0.4)
        (dy,) = torch.autograd.grad(s.sum(), y)
        torch.testing.assert_close(s.detach() - x, dy * y.detach(), atol=1e-5, rtol=1e-5)
        assert 0.3 < (dy == 0).float().mean() < 0.5
        found.append(dy)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(layout, dropout_p):
    x, y, weight, bias = arguments((2, 3, 16))
    if layout == "permuted":
        x, y = (p.permute(1, 2, 0).contiguous().permute(2, 0, 1) for p in (x, y))
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    forward = torch.ops.lcconformer.residual_layer_norm_fwd.default
    torch.library.opcheck(forward, (x, y, weight, bias, seed, 1.0, dropout_p, 1e-5))
    s, _n, mean, rstd = forward(x, y, weight, bias, seed, 1.0, dropout_p, 1e-5)
    backward = torch.ops.lcconformer.residual_layer_norm_bwd.default
    torch.library.opcheck(backward, (x, y, s, mean, rstd, weight, seed, 1.0, dropout_p))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_compiles_whole_without_recompiling_over_t(name):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def call(*args):
        return ops.residual_layer_norm(*args, alpha=0.5)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for t in (5, 9, 12):
        args = [p.requires_grad_() for p in arguments((2, t, 8))]
        with backend(name):
            s, n = compiled(*args)
        grads = torch.autograd.grad(s.sum() + n.square().sum(), args)
        s, n = residual_layer_norm_reference(*args, alpha=0.5)
        torch.testing.assert_close(grads, torch.autograd.grad(s.sum() + n.square().sum(), args), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports_with_dynamic_t(name):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return ops.residual_layer_norm(*args)

    frames = {1: torch.export.Dim("frames", min=3, max=4096)}
    with backend(name), torch.no_grad():
        program = torch.export.export(Module(), tuple(arguments()), dynamic_shapes=((frames, frames, None, None),))
        again = arguments((2, 11, 8))
        torch.testing.assert_close(program.module()(*again), residual_layer_norm_reference(*again))


@pytest.mark.gpu
def test_dropout_is_fresh_at_every_replay():
    args = arguments((8, 64, 256))
    with torch.no_grad(), backend("triton"):
        ops.residual_layer_norm(*args, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            s, _ = ops.residual_layer_norm(*args, dropout_p=0.5)
        graph.replay()
        first = s.clone()
        graph.replay()
    assert not torch.equal(first, s)
