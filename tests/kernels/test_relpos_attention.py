"""The Triton kernels of relpos_attention, interpreted on the CPU or compiled on a GPU, against a float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from lcconformer.kernels import relpos_attention as kernels
from lcconformer.kernels.common import dropout_scale, dropout_threshold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "pos", "u", "v_bias")


def pad_and_view(x: Tensor) -> Tensor:
    """The relative shift as Transformer-XL's code has it: [B, H, T, 2T-1] -> [B, H, T, T]."""
    b, h, t, positions = x.shape
    x = F.pad(x, (1, 0)).reshape(b, h, positions + 1, t)[:, :, 1:]
    return x.reshape(b, h, t, positions)[..., :t]


def oracle(q, k, v, pos, u, v_bias, lengths: Tensor | None, keep: Tensor | None = None, scale: float = 1.0) -> Tensor:
    t = q.shape[1]
    content = torch.einsum("bihd,bjhd->bhij", q + u, k)
    position = torch.einsum("bihd,rhd->bhir", q + v_bias, pos)
    scores = (content + pad_and_view(position)) / q.shape[-1] ** 0.5
    if lengths is not None:
        outside = torch.arange(t, device=q.device) >= lengths[:, None, None, None]  # [B, 1, 1, T]
        scores = scores.masked_fill(outside, float("-inf"))
        # without any key: no weights
        scores = scores.masked_fill((lengths == 0)[:, None, None, None], 0.0)
        weights = scores.softmax(-1).masked_fill(outside, 0.0)
    else:
        weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep.to(weights.dtype) * scale
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def make_inputs(b: int, t: int, h: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The six inputs and the gradient of the output."""
    shapes = [(b, t, h, d)] * 3 + [(2 * t - 1, h, d), (h, d), (h, d), (b, t, h, d)]
    *inputs, dout = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
    return inputs, dout


def with_gradients(inputs, dout, lengths, dtype, keep=None, scale=1.0) -> list[Tensor]:
    """Output and gradients of the oracle, computed in ``dtype``."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    out = oracle(*leaves, lengths, keep, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def run(inputs, dout, lengths=None, seed=None, p=0.0, cu_seqlens=None) -> list[Tensor]:
    """Output and gradients of the kernels."""
    out, lse = kernels.forward(*inputs, lengths, cu_seqlens, seed, p)
    return [out, *kernels.backward(dout, *inputs, lengths, cu_seqlens, seed, out, lse, p)]


@pytest.fixture
def check(assert_close):
    """Kernels against the oracle: output and all six gradients."""

    def compare(inputs, dout, lengths=None, seed=None, p=0.0, keep=None):
        given = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        scale = dropout_scale(p)
        ref = with_gradients(inputs, dout, given, torch.float64, keep, scale)
        low = with_gradients(inputs, dout, given, inputs[0].dtype, keep, scale)
        got = run(inputs, dout, given, seed, p)
        # a single key: dS is the difference of two equal numbers, and rounds as they do
        t = inputs[0].shape[1]
        cancels = (dout.double() * inputs[2].double()).sum(-1).abs().max() * inputs[1].abs().max() if t == 1 else 0.0
        for i, name in enumerate(("out", *(f"d{n}" for n in NAMES))):
            score_gradient = name not in ("out", "dv")
            assert_close(name, got[i], ref[i], low[i], 2 if i == 0 else 3, float(cancels) * score_gradient)

    return compare


@pytest.fixture
def _large_tiles(monkeypatch):
    """float32 in the tiles of float16: the interpreter pays per tile."""
    if DEVICE == "cuda":
        return
    config = kernels.config_for
    monkeypatch.setattr(kernels, "config_for", lambda kernel, arch, _, d: config(kernel, arch, torch.float16, d))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])

# T, H, D, lengths
CASES = [
    (1, 2, 16, None),
    (1, 1, 16, [1, 0]),
    (7, 2, 32, [7, 3]),
    (63, 1, 24, None),
    (65, 1, 64, [65, 0]),
    (127, 1, 16, [100]),
    (203, 1, 40, None),
    (33, 1, 128, [33, 32]),
]


@DTYPES
@pytest.mark.parametrize(("t", "h", "d", "lengths"), CASES)
@pytest.mark.usefixtures("poisoned", "_large_tiles")
def test_equals_the_oracle(check, t, h, d, lengths, dtype):
    b = 1 if lengths is None else len(lengths)
    check(*make_inputs(b, t, h, d, dtype), lengths)


@pytest.mark.parametrize(("d", "dtype"), [(16, torch.float32), (128, torch.float16)])
def test_tiles_elsewhere(check, monkeypatch, d, dtype):
    """Those of float32, and those of wide heads where there is no product of 64 rows."""
    monkeypatch.setattr(kernels, "arch_of", lambda x: 86)
    assert kernels.config_for("forward", 86, dtype, d).blocks["BLOCK_N"] == 16
    check(*make_inputs(2, 67, 1, d, dtype), [67, 34])


@pytest.mark.usefixtures("poisoned")
def test_an_utterance_without_frames_gives_zeros():
    inputs, dout = make_inputs(2, 37, 1, 16, torch.float32)
    out, dq, dk, dv, dpos, du, dv_bias = run(inputs, dout, torch.tensor([0, 0], device=DEVICE))
    for x in (out, dq, dk, dv, dpos, du, dv_bias):
        assert (x == 0).all()


@pytest.mark.usefixtures("_large_tiles")
def test_padding_is_not_read():
    """Keys and values beyond the length may hold anything, and get no gradient."""
    inputs, dout = make_inputs(1, 70, 1, 16, torch.float32)
    lengths = torch.tensor([37], device=DEVICE)
    clean = run(inputs, dout, lengths)
    for x in inputs[1:3]:
        x[:, 37:] = float("nan")
    got = run(inputs, dout, lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, clean))
    assert (got[2][:, 37:] == 0).all()
    assert (got[3][:, 37:] == 0).all()


@pytest.mark.usefixtures("_large_tiles")
def test_lengths_of_another_dtype_or_stride():
    inputs, dout = make_inputs(2, 20, 1, 16, torch.float32)
    want = run(inputs, dout, torch.tensor([20, 9], device=DEVICE))
    for lengths in (torch.tensor([20, 9], dtype=torch.int32), torch.tensor([20, 3, 9, 3])[::2]):
        for a, b in zip(want, run(inputs, dout, lengths.to(DEVICE))):
            assert torch.equal(a, b)


def test_strides(check):
    """q, k, v out of one packed projection, pos transposed, biases sliced, and a transposed gradient."""
    b, t, h, d = 2, 40, 2, 16
    packed = torch.randn(b, t, 3, h, d, device=DEVICE)
    pos = torch.randn(h, 2 * t - 1, d, device=DEVICE).transpose(0, 1)
    u, v_bias = torch.randn(h, 2 * d, device=DEVICE)[:, ::2], torch.randn(2 * h, d, device=DEVICE)[::2]
    dout = torch.randn(b, h, t, d, device=DEVICE).transpose(1, 2)
    inputs = [*packed.unbind(2), pos, u, v_bias]
    assert not any(x.is_contiguous() for x in (*inputs, dout))
    check(inputs, dout, [40, 21])


def test_a_gradient_that_is_one_number_everywhere(check):
    # dv_bias is the small difference of large sums: two utterances and eight heads, for eager's error in a few numbers is luck
    inputs, _ = make_inputs(2, 40, 8, 16, torch.float32)
    check(inputs, torch.ones((), device=DEVICE).expand(2, 40, 8, 16))


def test_last_dimension_strided(check):
    inputs, dout = make_inputs(1, 40, 1, 16, torch.float32)
    inputs = [x.repeat_interleave(2, -1)[..., ::2] for x in inputs]
    check(inputs, dout.repeat_interleave(2, -1)[..., ::2])


@pytest.mark.parametrize("heads_at_a_time", [1, 3, 10])
def test_scratch_of_a_few_heads_at_a_time(check, monkeypatch, heads_at_a_time):
    """Five utterances of two heads; dpos out of three partial sums, each over all pieces."""
    monkeypatch.setattr(kernels, "_heads_at_a_time", lambda *_: heads_at_a_time)
    monkeypatch.setattr(kernels, "_position_parts", lambda *_: 3)
    check(*make_inputs(5, 9, 2, 16, torch.float32), [9, 5, 0, 7, 1])


def test_scratch_stays_in_the_l2_where_that_fills_the_device():
    def scratch_and_programs(heads: int, t: int) -> tuple[int, int]:
        tiles = -(-t // 64)
        most = kernels._heads_at_a_time(heads, t, tiles, 2)
        return most * 2 * kernels._padded_frames(t) ** 2 * 2, most * tiles

    for heads, t in ((4, 100), (32, 400), (128, 400), (512, 203)):
        assert scratch_and_programs(heads, t)[0] <= kernels.SCRATCH
    for heads, t in ((128, 1500), (8, 6000)):  # a head is larger than that
        scratch, programs = scratch_and_programs(heads, t)
        assert 132 <= programs <= 3 * 132
        assert scratch <= 3 * 132 * 64 * 4 * (t + 64)
    assert kernels._heads_at_a_time(4, 50_000, 782, 2) == 1


def test_large_scores():
    """Weights of one key near 1, others below the smallest float: no overflow, no NaN."""
    inputs, dout = make_inputs(1, 40, 1, 16, torch.float32)
    inputs[0] = 1e3 * inputs[0]
    out, *grads = run(inputs, dout)
    ref = oracle(*(x.double() for x in inputs), None)
    assert (out.double() - ref).abs().max() < 1e-2
    assert all(x.isfinite().all() for x in grads)


def philox_keep(seed: int, b: int, h: int, t: int, p: float) -> Tensor:
    """The dropout decisions of [B, H, T, T] as kernels/common.py documents them, in numpy."""
    mask = np.uint64(0xFFFFFFFF)
    major, row, column = np.meshgrid(np.arange(b * h), np.arange(t), np.arange(t), indexing="ij")
    c = [x.astype(np.uint64) for x in (column // 8, row, major, np.zeros_like(row))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(7):
        low, high = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [high >> np.uint64(32) ^ c[1] ^ key[0], high & mask, low >> np.uint64(32) ^ c[3] ^ key[1], low & mask]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    word = np.take_along_axis(np.stack(c), (column % 8 // 2)[None], 0)[0]
    half = np.where(column % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return torch.from_numpy((half >= dropout_threshold(p)).reshape(b, h, t, t)).to(DEVICE)


@pytest.mark.parametrize(("b", "h", "t"), [(2, 3, 70), (1, 1, 1), (1, 2, 129)])
def test_dropout_words(b, h, t):
    """One bit a score: those of the stream that every backend draws from."""
    p, seed = 0.3, -(2**35) - 17
    ends = {"lengths_ptr": None, "cu_seqlens_ptr": None}
    words = kernels._dropout_words(torch.tensor([seed], device=DEVICE), p, b, t, h, ends)
    bits = words[..., None].bitwise_right_shift(torch.arange(32, dtype=torch.int32, device=DEVICE)) & 1
    got = bits.permute(0, 1, 3, 2, 4).flatten(-2)[:, :, :t, :t]  # [B, H, T, T]
    assert torch.equal(got.bool(), philox_keep(seed, b, h, t, p))


@pytest.mark.usefixtures("_large_tiles")
@pytest.mark.parametrize(
    ("t", "h", "lengths", "dtype"), [(70, 1, [33, 70], torch.float32), (9, 2, [9, 4], torch.float16)]
)
def test_dropout_is_the_same_in_forward_and_backward(check, t, h, lengths, dtype):
    """With the mask written down, forward and all gradients are those of a fixed elementwise product."""
    p, seed = 0.3, 2**35 + 17
    keep = philox_keep(seed, len(lengths), h, t, p)
    inputs, dout = make_inputs(len(lengths), t, h, 16, dtype)
    check(inputs, dout, lengths, torch.tensor([seed], device=DEVICE), p, keep)


@pytest.mark.usefixtures("poisoned", "_large_tiles")
@DTYPES
def test_packed(assert_close, dtype):
    """Utterances of 40, 0, 70 and 1 frames behind one another; shorter ones use the middle rows of pos."""
    lengths, longest, h, d = [40, 0, 70, 1], 75, 1, 16
    ends = torch.tensor([0, *lengths]).cumsum(0)
    n = int(ends[-1])
    shapes = [(n, 2 * h, d)] * 3 + [(2 * longest - 1, h, d), (h, d), (h, d), (n, h, d)]
    *inputs, dout = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
    inputs[:3] = [x[:, :h] for x in inputs[:3]]

    def separately(in_dtype):
        leaves = [x.detach().to(in_dtype, copy=True).requires_grad_() for x in inputs]
        q, k, v, pos, u, v_bias = leaves
        outs = []
        for a, t in zip(ends.tolist(), lengths):
            rows = pos[longest - t : longest + t - 1] if t else pos[:0]
            one = [x[a : a + t][None] for x in (q, k, v)]
            outs.append(oracle(*one, rows, u, v_bias, None)[0] if t else q[:0])
        out = torch.cat(outs)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(in_dtype))]

    ref, low = separately(torch.float64), separately(dtype)
    got = run(inputs, dout, cu_seqlens=ends.to(DEVICE, torch.int32))
    for i, name in enumerate(("out", *(f"d{n}" for n in NAMES))):
        assert_close(name, got[i], ref[i], low[i], 2 if i == 0 else 3)


def test_deterministic():
    inputs, dout = make_inputs(2, 33, 1, 16, torch.float16)
    first = run(inputs, dout)
    for a, b in zip(first, run(inputs, dout)):
        assert torch.equal(a, b)


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize("d", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("t", [1, 7, 63, 65, 127, 203, 400, 1500])
def test_gpu_equals_the_oracle(check, t, d, dtype):
    h = 4 if t < 1000 else 1
    check(*make_inputs(3, t, h, d, dtype), [t, t // 2, max(t - 1, 0)])


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize("d", [64, 128])
def test_gpu_dropout(check, d, dtype):
    p, seed, t = 0.1, 123456789, 203
    keep = philox_keep(seed, 2, 2, t, p)
    inputs, dout = make_inputs(2, t, 2, d, dtype)
    check(inputs, dout, [t, 90], torch.tensor([seed], device=DEVICE), p, keep)


@pytest.mark.gpu
@GPU_DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gpu_gives_the_same_bits_thirty_times(p, dtype):
    inputs, dout = make_inputs(8, 400, 4, 64, dtype)
    seed = torch.tensor([5], device=DEVICE) if p else None
    lengths = torch.arange(50, 450, 50, device=DEVICE)
    first = run(inputs, dout, lengths, seed, p)
    for _ in range(30):
        for a, b in zip(first, run(inputs, dout, lengths, seed, p)):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_graph_replay():
    inputs, dout = make_inputs(2, 100, 4, 64, torch.bfloat16)
    lengths = torch.tensor([100, 60], device=DEVICE)
    run(inputs, dout, lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(inputs, dout, lengths)
    fresh, fresh_dout = make_inputs(2, 100, 4, 64, torch.bfloat16)
    for x, y in zip((*inputs, dout), (*fresh, fresh_dout)):
        x.copy_(y)
    lengths.copy_(torch.tensor([31, 100]))
    graph.replay()
    for a, b in zip(got, run(fresh, fresh_dout, lengths)):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """The second utterance lies 2^31 elements behind the first."""
    b, t, h, d, far = 2, 70, 1, 64, 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 5 * far:
        pytest.skip("needs 11 GB of free device memory")
    inputs, dout = make_inputs(b, t, h, d, torch.float16)
    memory = torch.empty(far + t * h * d, dtype=torch.float16, device=DEVICE)
    q = memory.as_strided((b, t, h, d), (far, h * d, d, 1))
    q.copy_(inputs[0])
    for a, b_ in zip(run([q, *inputs[1:]], dout), run(inputs, dout)):
        assert torch.equal(a, b_)


@pytest.mark.gpu
def test_gpu_other_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, dout = make_inputs(1, 20, 1, 16, torch.float16)
    want = run(inputs, dout)
    got = run([x.to("cuda:1") for x in inputs], dout.to("cuda:1"))
    for a, b in zip(got, want):
        assert a.device.index == 1
        assert torch.equal(a.to(b.device), b)
