"""The encoder under torch.compile, torch.export, autocast, activation checkpointing and torch.func."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5, dropout=0.0, input_dim=10)
FORMS = [
    {},
    {"conv_norm": "batch", "subsampling": "conv", "subsampling_factor": 4},
    {"conv_norm": "group", "position": "rotary", "subsampling": "stack", "subsampling_factor": 3},
    {"conv_norm": "none", "position": "none", "conditioning": ("layer_norm", "step", "film", "lora")},
    {"conv_norm": "batch", "conv_norm_statistics": "per_depth", "sharing": "none"},
]


def data(frames, batch=2):
    return torch.randn(batch, frames, 10), torch.arange(frames, frames - batch, -1).clamp(min=1)


def loss_of(out):
    """A weighted sum: the plain one and that of squares hardly depend on anything behind a LayerNorm."""
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return (out * torch.arange(out.numel()).sin().view_as(out)).sum()


def step(model, x, lengths):
    model.zero_grad()
    out, _ = model(x, lengths)
    loss_of(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# "eager" checks the tracing; "aot_eager" also traces the backward and turns updates of statistics into outputs
@pytest.mark.parametrize(
    ("changes", "backend"),
    [*((f, "eager") for f in FORMS), pytest.param(FORMS[1], "aot_eager", marks=pytest.mark.slow)],
    ids=str,
)
def test_one_graph_for_all_lengths(changes, backend):
    """Forward and backward in one graph without breaks, compiled once for every T, equal to eager."""
    torch._dynamo.reset()
    # in float64: gradients that are sums of cancelling terms differ by more than any tight bound in float32
    encoder = ConformerEncoder(BASE.replace(**changes)).double().train()
    eager = copy.deepcopy(encoder)
    compiled = torch.compile(encoder, backend=backend, fullgraph=True, dynamic=True)
    for frames in (21, 9, 34, 13):
        x, lengths = data(frames)
        x = x.double()
        with lcconformer.backend("torch"):  # what is compiled is the reference
            want = step(eager, x, lengths)
        with torch.compiler.set_stance("default" if frames == 21 else "fail_on_recompile"):
            got = step(compiled, x, lengths)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(encoder.get_buffer(name), buffer)


def test_one_graph_without_lengths_and_one_per_depth():
    torch._dynamo.reset()
    encoder = ConformerEncoder(BASE).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for depth in (2, 1, 2, 1):
            for frames in (8, 15):
                x, _ = data(frames)
                torch.testing.assert_close(compiled(x, depth=depth)[0], encoder(x, depth=depth)[0])
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inductor():
    torch._dynamo.reset()
    encoder = ConformerEncoder(BASE.replace(conditioning=("film",))).train()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    for frames in (21, 34):
        x, lengths = data(frames)
        want = step(encoder, x, lengths)
        for got, expected in zip(step(compiled, x, lengths), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", FORMS[:3], ids=str)
def test_export_with_dynamic_frames_and_batch(changes):
    encoder = ConformerEncoder(BASE.replace(**changes)).eval()
    # three frames or more at the layers, since fewer have strides of their own; whole groups for a front end
    factor = encoder.config.subsampling_factor
    batch, frames = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=3, max=1024)
    dynamic = {"x": {0: batch, 1: factor * frames if factor > 1 else frames}, "lengths": {0: batch}}
    program = torch.export.export(encoder, data(17 * factor), dynamic_shapes=dynamic).module()
    for b, t in ((2, 17), (1, 3), (5, 50), (3, 4)):
        x, lengths = data(t * factor, b)
        torch.testing.assert_close(program(x, lengths)[0], encoder(x, lengths)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(changes, dtype):
    """Output and gradients come close to float32's, parameters keep float32 gradients."""
    encoder = ConformerEncoder(BASE.replace(**changes)).train()
    x, lengths = data(21)
    exact = step(copy.deepcopy(encoder), x, lengths)
    with torch.autocast("cpu", dtype=dtype):
        out, _ = encoder(x, lengths)
    loss_of(out).backward()
    got = [out.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]
    tolerance = 8 * torch.finfo(dtype).eps  # a handful of roundings
    # a bias in front of a BatchNorm has no gradient but noise: that is measured by all gradients together
    whole = torch.stack([g.norm() for g in exact[1:]]).norm()
    for i, (value, want) in enumerate(zip(got, exact, strict=True)):
        assert value.isfinite().all()
        assert value.dtype in (torch.float32, dtype)
        error = (value.float() - want).norm()
        assert error <= tolerance * ((5 if i else 1) * want.norm() + 0.1 * whole * bool(i))
    for p in encoder.parameters():
        assert p.grad is None or p.grad.dtype == torch.float32


@pytest.mark.parametrize("changes", [FORMS[0], FORMS[2], FORMS[3]], ids=str)
def test_activation_checkpointing(changes):
    """Recomputing gives the same gradients, dropout included."""
    encoder = ConformerEncoder(BASE.replace(dropout=0.3, **changes)).train()
    x, lengths = data(21)
    x.requires_grad_()
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        encoder.zero_grad()
        out = checkpoint(encoder, x, lengths, use_reentrant=False)[0] if recompute else encoder(x, lengths)[0]
        (gradient,) = torch.autograd.grad(loss_of(out), x, retain_graph=not recompute)
        results.append((out, gradient))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=1e-7)


def test_half_precision_module():
    """A module cast to bfloat16 as a whole runs, and stays near float32."""
    for changes in FORMS[:4]:
        encoder = ConformerEncoder(BASE.replace(**changes)).eval()
        x, lengths = data(21)
        want = encoder(x, lengths)[0]
        got = encoder.bfloat16()(x.bfloat16(), lengths)[0]
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 0.05 * want.norm()
