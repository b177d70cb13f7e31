"""The Triton kernels of glu_depthwise_conv, interpreted on the CPU or compiled on a GPU, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import glu_depthwise_conv as kernels
from lcconformer.kernels import glu_depthwise_conv_backward as backward_kernels
from lcconformer.kernels.common import LaunchConfig

from lcconformer.ops.glu_depthwise_conv.reference import depthwise_conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # sigmoid of a large negative number, 1 / (1 + inf)
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
GRADS = ("dx", "dweight", "dbias", "dnorm_weight", "dnorm_bias")


def oracle(inputs: dict[str, Tensor | None], lengths: list[int], norm: str, groups: int) -> Tensor:
    """Utterance by utterance, from PyTorch's own operators, in the dtype of the inputs."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    gamma, beta = inputs["norm_weight"], inputs["norm_bias"]
    c = weight.shape[0]
    rows = []
    for row, n in zip(x, lengths):
        glu = row[:n, :c] * torch.sigmoid(row[:n, c:])
        glu = F.pad(glu, (0, 0, 0, row.shape[0] - n)).t()[None]  # [1, C, T]
        rows.append(depthwise_conv1d(glu, weight, bias)[0].t())
    if norm == "layer":
        rows = [F.layer_norm(y, (c,), gamma, beta, EPS) for y in rows]
    elif norm == "running":
        mean, var = (inputs[name].to(x.dtype) for name in ("running_mean", "running_var"))
        rows = [F.batch_norm(y, mean, var, gamma, beta, eps=EPS) for y in rows]
    elif norm == "batch":
        real = torch.cat([y[:n] for y, n in zip(rows, lengths)])
        mean, var = real.mean(0), real.var(0, unbiased=False)
        rows = [(y - mean) / (var + EPS).sqrt() * gamma + beta for y in rows]
    elif norm == "group":
        normed = []
        for y, n in zip(rows, lengths):
            grouped = y.unflatten(1, (groups, c // groups))  # [T, G, C / G]
            mean, var = grouped.new_zeros(groups, 1), grouped.new_zeros(groups, 1)
            if n:
                mean, var = grouped[:n].mean((0, 2))[:, None], grouped[:n].var((0, 2), unbiased=False)[:, None]
            normed.append(((grouped - mean) / (var + EPS).sqrt()).flatten(1) * gamma + beta)
        rows = normed
    return F.silu(torch.stack(rows))


def make_inputs(b: int, t: int, c: int, k: int, norm: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    normed, running = norm != "none", norm == "running"
    inputs = {
        "x": torch.randn(b, t, 2 * c),
        "weight": torch.randn(c, k) / k**0.5,
        "bias": torch.randn(c),
        "norm_weight": 0.5 + torch.rand(c) if normed else None,
        "norm_bias": torch.randn(c) if normed else None,
        "running_mean": torch.randn(c) if running else None,
        "running_var": 0.5 + torch.rand(c) if running else None,
    }
    # rounded to the dtype under test: what is compared is the arithmetic
    return {
        name: None if p is None else p.to(DEVICE, torch.float32 if "running" in name else dtype)
        for name, p in inputs.items()
    }


def with_gradients(inputs, dout, lengths, norm, groups, dtype):
    """(out, {gradient name: gradient}) of the oracle computed in ``dtype``."""
    leaves = {
        name: p if p is None or "running" in name else p.to(dtype, copy=True).requires_grad_()
        for name, p in inputs.items()
    }
    out = oracle(leaves, lengths, norm, groups)
    out.backward(dout.to(dtype))
    named = {g: leaves[g[1:]] for g in GRADS}
    return out.detach(), {name: p.grad for name, p in named.items() if p is not None}


def run(inputs, dout, lengths, norm, groups):
    """(out, gradients) of the kernels."""
    # every other element of a longer tensor
    given = None if lengths is None else torch.tensor(lengths, device=DEVICE).repeat_interleave(2)[::2]
    kind = "batch" if norm == "running" else norm
    p = inputs
    norm_parameters = (p["norm_weight"], p["norm_bias"])
    out, *saved = kernels.forward(
        p["x"], p["weight"], p["bias"], given, *norm_parameters, p["running_mean"], p["running_var"],
        kind, groups, norm == "batch", EPS, True,
    )  # fmt: skip
    dx, dtaps, dbias, dnorm = backward_kernels.backward(
        dout, p["x"], p["weight"], given, *norm_parameters, *saved, kind, groups, norm == "batch", EPS
    )
    grads = {"dx": dx, "dweight": dtaps.t(), "dbias": dbias}
    if dnorm.numel():
        grads["dnorm_bias"], grads["dnorm_weight"] = dnorm
    return out, grads


@pytest.fixture
def check(assert_close):
    """Kernels against the oracle: output and every gradient."""

    def compare(inputs, dout, lengths, norm, groups=1):
        dtype = inputs["x"].dtype
        frames = [inputs["x"].shape[1]] * inputs["x"].shape[0] if lengths is None else lengths
        ref, ref_grads = with_gradients(inputs, dout, frames, norm, groups, torch.float64)
        low, low_grads = with_gradients(inputs, dout, frames, norm, groups, dtype)
        out, grads = run(inputs, dout, lengths, norm, groups)
        assert_close("out", out, ref, low, 2)
        assert grads.keys() == ref_grads.keys()
        for name, grad in grads.items():
            # a sum over frames rounds like its terms
            scale = 0.0 if name == "dx" else dout.shape[:2].numel() ** 0.5 * dout.abs().max().item()
            assert_close(name, grad, ref_grads[name], low_grads[name], 3, scale)

    return compare


@pytest.fixture
def _wide(monkeypatch):
    """One program for a whole utterance, so that its loops over frames run more than once (and interpret faster)."""

    def one_chunk(batch, frames, programs, least):
        return 1, max(frames, 1)

    for module in (kernels, backward_kernels):
        monkeypatch.setattr(module, "chunks_of", one_chunk)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])

# norm, T, C, K, lengths
CASES = [
    ("none", 1, 5, 1, None),
    ("none", 7, 24, 31, [7, 3]),
    ("none", 63, 5, 63, None),
    ("none", 203, 40, 3, [150, 203]),
    ("running", 65, 24, 3, [65, 0]),
    ("layer", 1, 24, 3, None),
    ("layer", 65, 40, 31, [65, 40, 0]),
    ("layer", 127, 5, 1, [127, 64]),
    ("batch", 7, 24, 31, None),
    ("batch", 127, 40, 3, [100, 0, 127]),
    ("group", 7, 24, 31, None),
    ("group", 65, 24, 3, [65, 1, 0]),
]


@DTYPES
@pytest.mark.parametrize(("norm", "t", "c", "k", "lengths"), CASES)
@pytest.mark.usefixtures("_wide")
def test_equals_the_oracle(check, norm, t, c, k, lengths, dtype):
    b = 2 if lengths is None else len(lengths)
    inputs = make_inputs(b, t, c, k, norm, dtype)
    check(inputs, torch.randn(b, t, c, device=DEVICE, dtype=dtype), lengths, norm, groups=4)


@pytest.mark.parametrize("norm", ["layer", "batch", "group"])
def test_shipped_tiles(check, norm):
    """More tiles than one in time, and more channels than one block of the unnormed kernels."""
    inputs = make_inputs(2, 70, 72, 7, norm, torch.float32)
    check(inputs, torch.randn(2, 70, 72, device=DEVICE), [70, 41], norm, groups=3)


def test_shipped_tiles_of_long_inputs(check):
    """Several programs of many frames each, whose windows begin in the middle of an utterance."""
    inputs = make_inputs(1, 261, 5, 9, "layer", torch.float32)
    check(inputs, torch.randn(1, 261, 5, device=DEVICE), [250], "layer")


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_statistics_of_many_tiles(norm, check, monkeypatch):
    """Two partials a step of the merge, of utterances far apart: what lies between steps counts."""
    monkeypatch.setattr(kernels, "_MERGE_BATCH", LaunchConfig(4, 1, {"BLOCK_P": 2, "BLOCK_C": 16}))
    for module in (kernels, backward_kernels):
        monkeypatch.setattr(module, "MERGE_GROUP", LaunchConfig(4, 1, {"BLOCK_P": 2}))
    inputs = make_inputs(5, 7, 8, 1, norm, torch.float32)
    inputs["x"] *= torch.arange(1.0, 6.0, device=DEVICE)[:, None, None]
    check(inputs, torch.randn(5, 7, 8, device=DEVICE), [7, 3, 0, 5, 7], norm, groups=2)


def test_shipped_tiles_of_wide_inputs(check):
    """More channels than a program of LayerNorm convolves at a time, and than one warp normalises."""
    inputs = make_inputs(1, 10, 1100, 5, "layer", torch.float32)
    check(inputs, torch.randn(1, 10, 1100, device=DEVICE), [9], "layer")


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.usefixtures("_wide")
def test_strides(check, norm):
    """Transposed input, sliced weights, a gradient that is one number everywhere, and one that is transposed."""
    b, t, c, k = 2, 19, 24, 3
    inputs = make_inputs(b, t, c, k, norm, torch.float32)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["weight"] = torch.randn(c, 2 * k, device=DEVICE)[:, ::2]
    inputs["bias"], inputs["norm_weight"] = torch.randn(c, 2, device=DEVICE).unbind(1)
    inputs["norm_bias"] = torch.ones(1, device=DEVICE).expand(c)
    assert not inputs["x"].is_contiguous()
    check(inputs, torch.randn((), device=DEVICE).expand(b, t, c), [19, 12], norm)
    check(inputs, torch.randn(c, t, b, device=DEVICE).permute(2, 1, 0), None, norm)


@pytest.mark.parametrize("norm", ["none", "layer", "batch", "group"])
@pytest.mark.usefixtures("_wide")
def test_padding_is_not_read(norm):
    b, t, c, lengths = 3, 12, 24, [12, 5, 0]
    inputs = make_inputs(b, t, c, 5, norm, torch.float32)
    dout = torch.randn(b, t, c, device=DEVICE)
    expected, grads = run(inputs, dout, lengths, norm, 4)
    for row, n in zip(inputs["x"], lengths):
        row[n:] = float("nan")
    out, found = run(inputs, dout, lengths, norm, 4)
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(found[name], grad), name
    for row, n in zip(found["dx"], lengths):
        assert (row[n:] == 0).all()


@pytest.mark.usefixtures("_wide")
def test_the_same_bits_every_run():
    inputs = make_inputs(2, 65, 24, 7, "batch", torch.float32)
    dout = torch.randn(2, 65, 24, device=DEVICE)
    first, grads = run(inputs, dout, [65, 30], "batch", 1)
    for _ in range(30 if DEVICE == "cuda" else 1):
        again, found = run(inputs, dout, [65, 30], "batch", 1)
        assert torch.equal(first, again)
        assert all(torch.equal(found[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("norm", ["layer", "batch", "group"])
def test_lengths_end_at_t(norm):
    """A length beyond T, which a GPU does not check, reads nothing beyond T."""
    inputs = make_inputs(2, 9, 8, 3, norm, torch.float32)
    dout = torch.randn(2, 9, 8, device=DEVICE)
    expected, grads = run(inputs, dout, [9, 4], norm, 2)
    out, found = run(inputs, dout, [90, 4], norm, 2)
    assert torch.equal(out, expected)
    assert all(torch.equal(found[name], grad) for name, grad in grads.items())


def test_nothing_saved_gives_the_same_output():
    inputs = make_inputs(1, 9, 24, 3, "layer", torch.float32)
    parameters = [inputs[n] for n in ("x", "weight", "bias")], [inputs[n] for n in ("norm_weight", "norm_bias")]
    outs = [
        kernels.forward(*parameters[0], None, *parameters[1], None, None, "layer", 1, False, EPS, save)
        for save in (False, True)
    ]
    assert torch.equal(outs[0][0], outs[1][0])
    assert outs[0][1].numel() == 0


def test_offsets_beyond_32_bits():
    """Utterances 2^31 elements apart: memory is reserved, and only the pages in use are touched."""
    apart = 2**31 + 64
    t, c = 3, 8
    storage = torch.empty(apart + t * 2 * c, dtype=torch.float16, device=DEVICE)
    inputs = make_inputs(2, t, c, 3, "none", torch.float16)
    far = storage.as_strided((2, t, 2 * c), (apart, 2 * c, 1))
    far.copy_(inputs["x"])
    dout = torch.randn(2, t, c, device=DEVICE, dtype=torch.float16)
    near, near_grads = run(inputs, dout, None, "none", 1)
    inputs["x"] = far
    out, grads = run(inputs, dout, None, "none", 1)
    assert torch.equal(out, near)
    assert torch.equal(grads["dx"], near_grads["dx"])


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("norm", ["none", "layer", "batch", "group"])
def test_empty(b, t, norm):
    inputs = make_inputs(b, t, 8, 3, norm, torch.float32)
    out, grads = run(inputs, torch.randn(b, t, 8, device=DEVICE), None, norm, 2)
    assert out.shape == (b, t, 8)
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "running", "layer", "batch", "group"])
@pytest.mark.parametrize(
    ("t", "c", "k"), [(1, 256, 31), (127, 256, 31), (400, 512, 31), (203, 144, 63), (65, 1024, 15)]
)
def test_on_the_gpu(check, norm, t, c, k, dtype):
    lengths = [t, max(t // 2, 1), 0]
    inputs = make_inputs(3, t, c, k, norm, dtype)
    check(inputs, torch.randn(3, t, c, device=DEVICE, dtype=dtype), lengths, norm, groups=8)
