"""relpos_attention on the C++ kernels: every SIMD level, odd shapes, gradients against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lcconformer import ops
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.relpos_attention import relpos_attention_reference
from lcconformer.ops.relpos_attention.arguments import RelposAttention
from lcconformer.ops.relpos_attention.cpu import _inputs, forward

from .cpu_kernels import CPU, FRAMES, LEVELS, kernels, run
from .dropout import keep_factor

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(b: int, t: int, h: int, d: int) -> list[Tensor]:
    shapes = [(b, t, h, d)] * 3 + [(2 * t - 1, h, d), (h, d), (h, d)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def check(assert_close, inputs, dtype=torch.float32, layout="dense", level=None, **options) -> None:
    dout = [torch.randn(inputs[0].shape, dtype=torch.float64)]
    inputs, dout = ([x.to(dtype).double() for x in xs] for xs in (inputs, dout))
    with kernels(level):
        out, grads = run(lambda *x: ops.relpos_attention(*x, **options), inputs, dout, dtype, layout)
    low, low_grads = run(lambda *x: relpos_attention_reference(*x, **options), inputs, dout, dtype)
    ref, ref_grads = run(lambda *x: relpos_attention_reference(*x, **options), inputs, dout, torch.float64)
    assert_close("out", out[0], ref[0], low[0], 2)
    scale = max(float(g.abs().max()) for g in ref_grads[:3])
    for i, (g, ref_g, low_g) in enumerate(zip(grads, ref_grads, low_grads)):
        assert_close(f"gradient {i}", g, ref_g, low_g, 3, scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("t", [*FRAMES, 190, 433])
def test_odd_lengths(assert_close, level, t):
    """190 frames fill a block of keys, 433 are ten blocks of queries and three of keys."""
    check(assert_close, make_inputs(3, t, 2, 16), level=level, lengths=torch.tensor([t, t // 2, 0]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [16, 20, 33, 64, 128])
def test_head_widths(assert_close, level, d):
    check(assert_close, make_inputs(1, 61, 2, d), level=level)


@pytest.mark.parametrize("layout", ["strided", "scattered"])
def test_layouts(assert_close, layout):
    check(assert_close, make_inputs(2, 70, 2, 24), layout=layout, lengths=torch.tensor([70, 9]))


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16(assert_close, level):
    check(assert_close, make_inputs(2, 100, 2, 40), torch.bfloat16, level=level, lengths=torch.tensor([100, 33]))


def test_more_utterances_than_parts(assert_close):
    """dpos, du and dv_bias add up over utterances that share a partial sum."""
    check(
        assert_close,
        make_inputs(9, 20, 8, 16),
        lengths=torch.tensor([20, 0, 3, 20, 17, 1, 9, 20, 8], dtype=torch.int32),
    )


def test_packed_utterances_are_each_alone(assert_close):
    lengths, t = [50, 0, 7, 211], 220
    frames = sum(lengths)
    inputs = [torch.randn(frames, 2, 16, dtype=torch.float64) for _ in range(3)] + make_inputs(1, t, 2, 16)[3:]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    check(assert_close, inputs, cu_seqlens=cu_seqlens)


def test_padding_never_leaks():
    inputs = [x.float() for x in make_inputs(2, 90, 2, 16)]
    lengths = torch.tensor([90, 41])
    with kernels():
        clean = ops.relpos_attention(*inputs, lengths=lengths)
        for x in inputs[:3]:
            x[1, 41:] = float("nan")
        dirty = ops.relpos_attention(*inputs, lengths=lengths)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1, :41], clean[1, :41])


def test_nan_is_not_hidden():
    inputs = [x.float() for x in make_inputs(1, 60, 1, 16)]
    inputs[0][0, 5, 0, 3] = float("nan")
    with kernels():
        out = ops.relpos_attention(*inputs)
    assert out[0, 5].isnan().all()
    assert not out[0, 6].isnan().any()


def test_large_scores_stay_finite(assert_close):
    inputs = make_inputs(1, 250, 1, 16)
    inputs[0] *= 100
    check(assert_close, inputs)


@pytest.mark.parametrize("level", LEVELS)
def test_dropout_is_that_of_the_counters(assert_close, level):
    p, t, d = 0.3, 213, 16
    inputs, dout = make_inputs(2, t, 2, d), [torch.randn(2, t, 2, d, dtype=torch.float64)]
    inputs, dout = ([x.float().double() for x in xs] for xs in (inputs, dout))
    lengths = torch.tensor([t, 150])
    torch.manual_seed(3)
    seed = dropout_seed(inputs[0], p)
    keep = [keep_factor(int(seed), p, t, t, major=major) for major in range(4)]
    mask = torch.stack(keep).view(2, 2, t, t)

    def dropped(q, k, v, pos, u, v_bias):
        scores = _scores(q, k, pos, u, v_bias).masked_fill((torch.arange(t) >= lengths[:, None])[:, None, None], -1e30)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1) * mask.to(q.dtype), v)

    torch.manual_seed(3)
    with kernels(level):
        out, grads = run(lambda *x: ops.relpos_attention(*x, lengths=lengths, dropout_p=p), inputs, dout, torch.float32)
    low, low_grads = run(dropped, inputs, dout, torch.float32)
    ref, ref_grads = run(dropped, inputs, dout, torch.float64)
    assert_close("out", out[0], ref[0], low[0], 2)
    for i, (g, ref_g, low_g) in enumerate(zip(grads, ref_grads, low_grads)):
        assert_close(f"gradient {i}", g, ref_g, low_g, 3)


def _scores(q: Tensor, k: Tensor, pos: Tensor, u: Tensor, v_bias: Tensor) -> Tensor:
    """``[B, H, T, T]``, the relative positions gathered one by one."""
    t = q.shape[1]
    index = t - 1 - torch.arange(t)[:, None] + torch.arange(t)  # [T, T]
    content = torch.einsum("bihd,bjhd->bhij", q + u, k)
    position = torch.einsum("bihd,lhd->bhil", q + v_bias, pos)
    return (content + position.gather(-1, index.expand(*content.shape))) / math.sqrt(q.shape[-1])


def test_same_bits_for_any_number_of_threads():
    inputs, dout = make_inputs(3, 203, 2, 16), [torch.randn(3, 203, 2, 16)]
    lengths = torch.tensor([203, 60, 111])
    results = []
    for threads in (1, 2, 5):
        with kernels(threads=threads):
            out, grads = run(lambda *x: ops.relpos_attention(*x, lengths=lengths), inputs, dout, torch.float32)
        results.append([*out, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_plain_attention(assert_close):
    """Without positions; the op sends that to PyTorch, the kernel serves it all the same."""
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in range(3))
    lengths = torch.tensor([70, 30])
    out, _ = forward(RelposAttention(q, k, v, None, None, None, lengths, None, None, 0.0))
    low = relpos_attention_reference(q, k, v, lengths=lengths)
    ref = relpos_attention_reference(q.double(), k.double(), v.double(), lengths=lengths)
    assert_close("out", out, ref, low, 2)


def test_what_the_kernels_cannot_serve_is_said():
    inputs = make_inputs(1, 5, 1, 16)
    with kernels(), pytest.raises(NotImplementedError, match=r"dtype torch\.float64 is not one of float32, bfloat16"):
        ops.relpos_attention(*inputs)


# --- the inference engine's products of bfloat16 ---------------------------------------------------------------------


def by_pairs(inputs: list[Tensor | None], level=None, threads: int = 2, panels: bool = False, **options: Any) -> Tensor:
    """The output, bfloat16, with products of bfloat16; with ``panels`` positions are packed beforehand, from float32."""
    q, k, v, pos, u, v_bias = (x if x is None else x.bfloat16() for x in inputs)
    u, v_bias = (x if x is None else x.float() for x in (u, v_bias))
    products = CPU.Element.bfloat16
    with kernels(level, threads):
        arguments = _inputs(q, k, v, pos, u, v_bias, options.get("lengths"), options.get("cu_seqlens"), None, 0.0)
        if panels:
            t, h, d = arguments["frames"], *q.shape[-2:]
            wide = pos.float()
            packed = torch.full((h * CPU.relpos_attention_position_size(products, t, d),), torch.nan).bfloat16()
            CPU.relpos_attention_pack_positions(
                CPU.RelposAttentionPackPositions(
                    element=CPU.Element.float32, products=products, frames=t, heads=h, head_dim=d, threads=threads,
                    pos=wide.data_ptr(), pos_frame_stride=h * d, pos_head_stride=d, pos_panels=packed.data_ptr(),
                )
            )  # fmt: skip
            arguments |= {"pos": 0, "pos_panels": packed.data_ptr()}
        out = torch.full(q.shape, torch.nan, dtype=torch.bfloat16)
        args = CPU.RelposAttentionForward(**arguments, products=products, own_threads=True, out=out.data_ptr())
        CPU.relpos_attention_forward(args)
    return out


def check_by_pairs(assert_close, inputs: list[Tensor | None], level=None, **options) -> None:
    rounded = [x if x is None else x.bfloat16() for x in inputs]
    exact = [x if x is None else x.double() for x in rounded]
    ref, low = (relpos_attention_reference(*x, **options) for x in (exact, rounded))
    assert_close("out", by_pairs(inputs, level, **options), ref, low, 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("t", [*FRAMES, 190, 433])
def test_odd_lengths_by_pairs(assert_close, level, t):
    check_by_pairs(assert_close, make_inputs(3, t, 2, 16), level, lengths=torch.tensor([t, t // 2, 0]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [2, 16, 20, 33, 64, 128])
def test_head_widths_by_pairs(assert_close, level, d):
    check_by_pairs(assert_close, make_inputs(1, 61, 2, d), level)


def test_products_by_pairs_are_those_of_float32_but_for_their_rounding():
    """With inputs and weights that bfloat16 holds exactly, all that is rounded is the output."""
    inputs = make_inputs(1, 150, 2, 16)
    inputs[0].zero_(), inputs[4].zero_(), inputs[5].zero_()  # every weight is equal, a power of 2
    inputs[2] = inputs[2].bfloat16().double()
    lengths = torch.tensor([128])
    out = by_pairs(inputs, lengths=lengths)
    assert torch.allclose(out.double(), inputs[2][:, :128].mean(1, keepdim=True).expand_as(out), rtol=2**-8, atol=1e-7)


def test_packed_utterances_by_pairs_are_each_alone(assert_close):
    lengths, t = [50, 0, 7, 211], 220
    inputs = [torch.randn(sum(lengths), 2, 16, dtype=torch.float64) for _ in range(3)] + make_inputs(1, t, 2, 16)[3:]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    check_by_pairs(assert_close, inputs, cu_seqlens=cu_seqlens)
    whole, (first, end) = by_pairs(inputs, cu_seqlens=cu_seqlens), (50, 57)
    alone = by_pairs([x[first:end] for x in inputs[:3]] + inputs[3:], cu_seqlens=torch.tensor([0, 7]))
    assert torch.equal(whole[first:end], alone)


def test_plain_attention_by_pairs(assert_close):
    inputs = [*make_inputs(2, 70, 2, 16)[:3], None, None, None]
    check_by_pairs(assert_close, inputs, lengths=torch.tensor([70, 31]))


@pytest.mark.parametrize("level", LEVELS)
def test_padding_never_leaks_by_pairs(level):
    """An odd number of keys: the last one's neighbour in its pair is padding."""
    inputs = make_inputs(2, 90, 2, 16)
    lengths = torch.tensor([90, 41])
    clean = by_pairs(inputs, level, lengths=lengths)
    for x in inputs[:3]:
        x[1, 41:] = float("nan")
    dirty = by_pairs(inputs, level, lengths=lengths)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1, :41], clean[1, :41])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("d", [24, 33])
def test_same_bits_by_pairs(level, d):
    """On any number of threads, in any batch, with positions packed beforehand or not."""
    inputs = make_inputs(3, 203, 2, d)
    lengths = torch.tensor([203, 60, 111])
    outs = [by_pairs(inputs, level, threads, panels, lengths=lengths) for threads in (1, 2, 5) for panels in (0, 1)]
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    alone = by_pairs([x[1:2] for x in inputs[:3]] + inputs[3:], level, lengths=lengths[1:2])
    assert torch.equal(outs[0][1:2], alone)


def test_large_scores_stay_finite_by_pairs(assert_close):
    inputs = make_inputs(1, 250, 1, 16)
    inputs[0] *= 100
    check_by_pairs(assert_close, inputs)


@pytest.mark.parametrize(
    ("element", "products", "said"),
    [
        ("float32", "bfloat16", "products is bfloat16 and element float32; expected both bfloat16"),
        ("bfloat16", "float16", "products is float16; expected float32 or bfloat16"),
    ],
)
def test_other_products_are_refused(element, products, said):
    heads = CPU.Heads(data=64, batch_stride=0, frame_stride=0, head_stride=0)
    args = CPU.RelposAttentionForward(
        element=getattr(CPU.Element, element), products=getattr(CPU.Element, products), batch=0, frames=0, heads=0,
        head_dim=0, total_frames=0, threads=1, q=heads, k=heads, v=heads, out=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=said):
        CPU.relpos_attention_forward(args)
