"""The op glu_depthwise_conv: reference, checks, registration, compilation, dispatch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lcconformer import ops
from lcconformer.ops.glu_depthwise_conv import glu_depthwise_conv_reference
from lcconformer.ops.registry import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = ["none", "layer", "batch", "group"]


def arguments(b=2, t=9, c=8, k=3, norm="layer", dtype=torch.float64, lengths=None, device="cpu"):
    def make(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    args = {"x": make(b, t, 2 * c), "weight": make(c, k), "bias": make(c), "norm": norm, "num_groups": 2}
    if norm != "none":
        args |= {"norm_weight": make(c), "norm_bias": make(c)}
    if norm == "batch":
        args |= {"running_mean": make(c), "running_var": 0.5 + make(c).square(), "training": True}
    if lengths is not None:
        args["lengths"] = torch.tensor(lengths, dtype=torch.int64, device=device)
    return args


def leaves(args):
    """The differentiable inputs, ready for a gradient."""
    names = [n for n in ("x", "weight", "bias", "norm_weight", "norm_bias") if n in args]
    for name in names:
        args[name].requires_grad_()
    return [args[name] for name in names]


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_the_reference(norm):
    args = arguments(2, 5, 4, 3, norm, lengths=[5, 2])
    inputs = leaves(args)
    names = [n for n in args if any(args[n] is p for p in inputs)]

    def call(*tensors):
        return ops.glu_depthwise_conv(**args | dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(call, [args[n] for n in names])


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 4)}, "weight has K = 4; expected an odd kernel size from 1 to 63"),
        ({"weight": torch.zeros(8, 65)}, "weight has K = 65; expected an odd kernel size from 1 to 63"),
        ({"weight": torch.zeros(7, 3)}, r"x has shape \[2, 9, 16\]; expected \[B, T, 2C\] = \[\*, \*, 14\]"),
        ({"weight": torch.zeros(8)}, r"weight has shape \[8\]; expected \[C, K\]"),
        ({"weight": torch.zeros(8, 3, dtype=torch.float16)}, "weight has dtype torch.float16 but x has torch.float32"),
        ({"weight": torch.zeros(8, 3, device="meta")}, "weight is on meta but x is on cpu"),
        ({"norm_weight": torch.zeros(8, device="meta")}, "norm_weight is on meta but x is on cpu"),
        ({"norm_bias": None}, r"norm='layer' needs norm_bias \[C\]; got None"),
        ({"bias": torch.zeros(3)}, r"bias has shape \[3\]; expected \[C\] = \[8\]"),
        ({"norm": "instance"}, "norm is 'instance'; expected one of none, layer, batch, group"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of silu"),
        ({"norm": "group", "num_groups": 3}, "num_groups is 3; expected a divisor of C = 8"),
        ({"norm": "batch"}, "norm='batch' needs running_mean"),
        ({"lengths": torch.tensor([3, 10])}, r"lengths span 3 ... 10; expected values from 0 to T = 9"),
        ({"lengths": torch.tensor([3.0, 9.0])}, "lengths has dtype torch.float32; expected int64 or int32"),
        ({"lengths": torch.tensor([3])}, r"lengths has shape \[1\]; expected \[B\] = \[2\]"),
        ({"x": torch.zeros(2, 9, 16, dtype=torch.int32)}, "x has dtype torch.int32; expected one of float16"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.glu_depthwise_conv(**arguments(dtype=torch.float32) | change)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_empty_batches(b, t, norm, name):
    args = arguments(b, t, norm=norm, dtype=torch.float32, lengths=[0] * b, device=DEVICE)
    with backend(name):
        out = ops.glu_depthwise_conv(**args)
    assert out.shape == (b, t, 8)


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_without_kernels_auto_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("LCCONFORMER_BACKEND", raising=False)
    args = arguments(dtype=torch.float64)
    assert torch.equal(ops.glu_depthwise_conv(**args), glu_depthwise_conv_reference(**args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation 'relu' is not fused, only 'silu' is"),
        ({"dtype": torch.float64}, "dtype torch.float64 is not one of float16, bfloat16, float32"),
        ({"c": 2049}, "norm='layer' is fused up to C = 2048, got C = 2049"),
    ],
)
def test_triton_says_why_not(change, message):
    shape = {n: change[n] for n in ("dtype", "c") if n in change}
    args = arguments(**{"dtype": torch.float32, "device": DEVICE} | shape)
    args |= {n: v for n, v in change.items() if n not in shape}
    with backend("triton"), pytest.raises(NotImplementedError, match=message):
        ops.glu_depthwise_conv(**args)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    from lcconformer.kernels import common

    monkeypatch.setattr(common, "INTERPRETED", False)
    with backend("triton"), pytest.raises(NotImplementedError, match="runs only with TRITON_INTERPRET=1"):
        ops.glu_depthwise_conv(**arguments(dtype=torch.float32))


# --- the registered op -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_backends_agree(norm):
    """Output, every gradient, and the running statistics."""
    found = {}
    for name in ("torch", "triton"):
        torch.manual_seed(1)
        args = arguments(3, 11, 8, 5, norm, torch.float32, [11, 4, 0], DEVICE)
        inputs = leaves(args)
        with backend(name):
            out = ops.glu_depthwise_conv(**args)
        # an utterance without frames is normalised by 1 / sqrt(eps): keep its values out of the comparison
        grads = torch.autograd.grad(out[:2].square().sum(), inputs)
        found[name] = (out[:2].detach(), *grads, *(args[n] for n in args if n.startswith("running")))
    for ours, theirs in zip(found["triton"], found["torch"]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_evaluation_leaves_running_statistics_alone():
    args = arguments(norm="batch", dtype=torch.float32, device=DEVICE) | {"training": False}
    stored = args["running_mean"].clone(), args["running_var"].clone()
    with backend("triton"):
        out = ops.glu_depthwise_conv(**args)
    torch.testing.assert_close(out, glu_depthwise_conv_reference(**args), atol=1e-5, rtol=1e-5)
    assert torch.equal(args["running_mean"], stored[0])
    assert torch.equal(args["running_var"], stored[1])


@pytest.mark.parametrize(
    ("norm", "layout"), [(norm, "contiguous") for norm in NORMS] + [("layer", "permuted"), ("batch", "permuted")]
)
def test_opcheck(norm, layout):
    args = arguments(2, 3, 8, 1, norm, torch.float32, [3, 2], DEVICE)
    if layout == "permuted":
        args["x"] = args["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        args["weight"] = args["weight"].t().contiguous().t()
    names = ("x", "weight", "bias", "lengths", "norm_weight", "norm_bias", "running_mean", "running_var")
    tensors = [args.get(name) for name in names]
    options = (norm, 2, norm == "batch", 1e-5, "silu")
    forward = torch.ops.lcconformer.glu_depthwise_conv_fwd.default
    torch.library.opcheck(forward, (*tensors, *options, True))
    torch.library.opcheck(forward, (*tensors, *options, False), test_utils=("test_schema", "test_faketensor"))
    out, *saved = forward(*tensors, *options, True)
    dout = torch.randn_like(out).transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(
        torch.ops.lcconformer.glu_depthwise_conv_bwd.default,
        (dout, *tensors, *options, *saved),
    )


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_compiles_whole_without_recompiling_over_t(name, norm):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ops.glu_depthwise_conv, fullgraph=True, dynamic=True, backend=count)
    for t in (5, 9, 12):
        args = arguments(2, t, norm=norm, dtype=torch.float32, lengths=[t, 3], device=DEVICE)
        inputs = leaves(args)
        with backend(name):
            out = compiled(**args)
        grads = torch.autograd.grad(out.sum(), inputs)
        expected = glu_depthwise_conv_reference(**args)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs), atol=1e-3, rtol=1e-3)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports_with_dynamic_t(name):
    class Module(torch.nn.Module):
        def forward(self, x, weight, gamma, beta, lengths):
            return ops.glu_depthwise_conv(x, weight, lengths=lengths, norm="layer", norm_weight=gamma, norm_bias=beta)

    def inputs(t):
        args = arguments(2, t, dtype=torch.float32, lengths=[t, 2], device=DEVICE)
        return tuple(args[n] for n in ("x", "weight", "norm_weight", "norm_bias", "lengths"))

    frames = {1: torch.export.Dim("frames", min=3, max=4096)}
    with backend(name), torch.no_grad():
        program = torch.export.export(Module(), inputs(9), dynamic_shapes=(frames, None, None, None, None))
        again = inputs(14)
        torch.testing.assert_close(program.module()(*again), Module()(*again))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_graph_replay(norm):
    args = arguments(4, 64, 64, 31, norm, torch.float16, [64, 10, 0, 33], "cuda")
    with torch.no_grad(), backend("triton"):
        for _ in range(3):
            ops.glu_depthwise_conv(**args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.glu_depthwise_conv(**args)
        args["x"].normal_()
        graph.replay()
        assert torch.equal(out, ops.glu_depthwise_conv(**args))


@pytest.mark.gpu
def test_current_device_is_not_the_tensors(monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = arguments(2, 9, dtype=torch.float32, device="cuda:1")
    with torch.cuda.device(0), backend("triton"):
        torch.testing.assert_close(
            ops.glu_depthwise_conv(**args), glu_depthwise_conv_reference(**args), atol=1e-4, rtol=1e-4
        )
