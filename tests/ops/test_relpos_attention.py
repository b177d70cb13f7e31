"""relpos_attention as an op: reference, checks, dispatch, registration, compilation, export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lcconformer import ops
from lcconformer.ops.registry import backend
from lcconformer.ops.relpos_attention import relative_shift, relpos_attention_reference

B, T, H, D = 2, 21, 2, 16


def make_inputs(dtype=torch.float32, b=B, t=T, h=H, d=D, requires_grad=True) -> list[Tensor]:
    shapes = [(b, t, h, d)] * 3 + [(2 * t - 1, h, d), (h, d), (h, d)]
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((out * torch.arange(out.shape[-1])).square().sum(), inputs))


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 5])
def test_shift_picks_the_relative_position(t):
    x = torch.randn(3, t, 2 * t - 1)
    want = torch.stack([torch.stack([x[:, i, t - 1 - i + j] for j in range(t)], -1) for i in range(t)], -2)
    assert torch.equal(relative_shift(x), want)


def test_reference_score_by_score():
    q, k, v, pos, u, v_bias = make_inputs(torch.float64, requires_grad=False)
    lengths = [T, 9]
    want = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for h in range(H):
            for i in range(T):
                s = [
                    ((q[b, i, h] + u[h]) @ k[b, j, h] + (q[b, i, h] + v_bias[h]) @ pos[T - 1 - i + j, h]) / D**0.5
                    for j in range(n)
                ]
                want[b, i, h] = torch.stack(s).softmax(0) @ v[b, :n, h]
    got = relpos_attention_reference(q, k, v, pos, u, v_bias, lengths=torch.tensor(lengths))
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("lengths", [None, [4, 0]])
@pytest.mark.parametrize("relative", [True, False])
def test_gradcheck(relative, lengths):
    inputs = make_inputs(torch.float64, t=4, h=1, d=3)[: 6 if relative else 3]
    given = None if lengths is None else torch.tensor(lengths)
    with backend("torch"):
        assert torch.autograd.gradcheck(lambda *x: ops.relpos_attention(*x, lengths=given), inputs)


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_without_kernels_the_reference_serves():
    inputs = make_inputs(torch.float64)
    assert torch.equal(ops.relpos_attention(*inputs), relpos_attention_reference(*inputs))


@pytest.fixture
def interpreted():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels are compiled, not interpreted on CPU tensors")
    with backend("triton"):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("lengths", [None, [21, 8]])
def test_triton_equals_the_reference(assert_close, lengths):
    inputs = make_inputs()
    given = None if lengths is None else torch.tensor(lengths)
    out = ops.relpos_attention(*inputs, lengths=given)
    low = relpos_attention_reference(*inputs, lengths=given)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ref = relpos_attention_reference(*exact, lengths=given)
    assert_close("out", out, ref, low, 2)
    for got, want, eager in zip(gradients(out, inputs), gradients(ref, exact), gradients(low, inputs)):
        assert_close("gradient", got, want, eager, 3)


@pytest.mark.usefixtures("interpreted")
def test_without_gradients_the_output_is_the_same():
    inputs = make_inputs()
    with torch.no_grad():
        without = ops.relpos_attention(*inputs)
    assert torch.equal(without, ops.relpos_attention(*inputs))
    assert without.grad_fn is None


@pytest.mark.usefixtures("interpreted")
def test_only_some_inputs_want_gradients():
    inputs = make_inputs(requires_grad=False)
    inputs[3].requires_grad_()
    (got,) = gradients(ops.relpos_attention(*inputs), inputs[3:4])
    (want,) = gradients(relpos_attention_reference(*inputs), inputs[3:4])
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.usefixtures("interpreted")
def test_dropout_follows_the_generator():
    inputs = make_inputs(b=1, h=1)

    def once(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        out = ops.relpos_attention(*inputs, dropout_p=0.5)
        return [out, *gradients(out, inputs)]

    first = once(1)
    assert all(torch.equal(a, b) for a, b in zip(first, once(1)))
    assert not torch.equal(first[0], once(2)[0])
    assert not torch.equal(first[0], ops.relpos_attention(*inputs))


@pytest.mark.usefixtures("interpreted")
def test_activation_checkpointing_repeats_the_dropout():
    inputs = make_inputs(b=1, h=1)
    results = []
    for call in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = call(lambda *x: ops.relpos_attention(*x, dropout_p=0.5), *inputs)
        results.append([out, *gradients(out, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [(torch.float64, 16, "dtype torch.float64 is not one of"), (torch.float32, 144, "up to D = 128, got D = 144")],
)
def test_what_triton_cannot_serve_is_said(dtype, d, reason):
    with pytest.raises(NotImplementedError, match=reason):
        ops.relpos_attention(*make_inputs(dtype, d=d))


# --- packed ----------------------------------------------------------------------------------------------------------


def _packed(requires_grad=True) -> tuple[list[Tensor], Tensor, list[int]]:
    lengths = [7, 0, 21, 1]
    shapes = [(sum(lengths), H, D)] * 3 + [(2 * T - 1, H, D), (H, D), (H, D)]
    inputs = [torch.randn(s, requires_grad=requires_grad) for s in shapes]
    return inputs, torch.tensor([0, *lengths]).cumsum(0), lengths


def test_packed_reference_is_each_utterance_alone():
    (q, k, v, pos, u, v_bias), ends, lengths = _packed(False)
    out = ops.relpos_attention(q, k, v, pos, u, v_bias, cu_seqlens=ends)
    assert out.shape == q.shape
    for a, t in zip(ends.tolist(), lengths):
        if t:
            alone = (x[None, a : a + t] for x in (q, k, v))
            want = relpos_attention_reference(*alone, pos[T - t : T + t - 1], u, v_bias)[0]
            assert torch.allclose(out[a : a + t], want, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_packed_triton_equals_the_reference(assert_close):
    inputs, ends, _ = _packed()
    out = ops.relpos_attention(*inputs, cu_seqlens=ends)
    low = relpos_attention_reference(*inputs, cu_seqlens=ends)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ref = relpos_attention_reference(*exact, cu_seqlens=ends)
    assert_close("out", out, ref, low, 2)
    for got, want, eager in zip(gradients(out, inputs), gradients(ref, exact), gradients(low, inputs)):
        assert_close("gradient", got, want, eager, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 7, 28])},
            r"cu_seqlens is \[0, 7, 28\]; expected 0 ... 29 in steps from 0 to T = 21",
        ),
        ({"cu_seqlens": torch.tensor([0, 7, 29])}, r"in steps from 0 to T = 21"),
        ({"cu_seqlens": torch.tensor([0, 21, 8, 29])}, r"in steps from 0 to T = 21"),
        ({"cu_seqlens": torch.tensor([0.0, 29.0])}, r"cu_seqlens has dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 29]])}, r"cu_seqlens has shape \[1, 2\]; expected \[B\+1\]"),
        ({"lengths": torch.tensor([7])}, r"cu_seqlens goes with pos and without lengths"),
        ({"pos": torch.randn(2 * T, H, D)}, r"pos has 42 rows; expected an odd number"),
        ({"q": torch.randn(1, 29, H, D)}, r"q has shape \[1, 29, 2, 16\]; expected \[frames, H, D\]"),
    ],
)
def test_bad_packed_input_is_refused(changes, message):
    inputs, ends, _ = _packed(False)
    given = dict(zip(("q", "k", "v", "pos", "u", "v_bias"), inputs)) | {"cu_seqlens": ends} | changes
    with pytest.raises(ValueError, match=message):
        ops.relpos_attention(**given)


# --- without positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [21, 8], [0, 21], [0, 0]])
def test_plain_attention(assert_close, lengths):
    inputs = make_inputs()[:3]
    given = None if lengths is None else torch.tensor(lengths)
    out = ops.relpos_attention(*inputs, lengths=given)
    low = relpos_attention_reference(*inputs, lengths=given)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ref = relpos_attention_reference(*exact, lengths=given)
    assert_close("out", out, ref, low, 2)
    for got, want, eager in zip(gradients(out, inputs), gradients(ref, exact), gradients(low, inputs)):
        assert_close("gradient", got, want, eager, 3)
    for b, n in enumerate(lengths or []):
        if n == 0:
            assert (out[b] == 0).all()


# --- bad input -------------------------------------------------------------------------------------------------------


def _replaced(index: int, x: Tensor) -> list[Tensor]:
    inputs = make_inputs()
    inputs[index] = x
    return inputs


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (lambda: _replaced(0, torch.randn(B, T, H)), {}, r"q has shape \[2, 21, 2\]; expected \[B, T, H, D\]"),
        (
            lambda: _replaced(1, torch.randn(B, T, H, 8)),
            {},
            r"k has shape \[2, 21, 2, 8\]; expected .* \[2, 21, 2, 16\]",
        ),
        (lambda: _replaced(2, torch.randn(B, 20, H, D)), {}, r"v has shape \[2, 20, 2, 16\]; expected"),
        (
            lambda: _replaced(3, torch.randn(T, H, D)),
            {},
            r"pos has shape \[21, 2, 16\]; expected \[2T-1, H, D\] = \[41,",
        ),
        (lambda: _replaced(4, torch.randn(D)), {}, r"u has shape \[16\]; expected \[H, D\]"),
        (lambda: _replaced(5, torch.randn(1, D)), {}, r"v_bias has shape \[1, 16\]; expected \[H, D\]"),
        (lambda: _replaced(3, torch.randn(2 * T - 1, H, D).half()), {}, r"pos has dtype torch.float16 but q has"),
        (lambda: _replaced(1, torch.randn(B, T, H, D).to("meta")), {}, r"k is on meta but q is on cpu"),
        (lambda: [x.detach().int() for x in make_inputs()], {}, r"q has dtype torch.int32; expected one of float16"),
        (lambda: make_inputs()[:4], {}, r"pos, u and v_bias go together"),
        (make_inputs, {"lengths": torch.tensor([1.0, 2.0])}, r"lengths has dtype torch.float32; expected int64"),
        (make_inputs, {"lengths": torch.tensor([1, 2, 3])}, r"lengths has shape \[3\]; expected \[B\] = \[2\]"),
        (make_inputs, {"lengths": torch.tensor([1, 22])}, r"lengths span 1 ... 22; expected values from 0 to T = 21"),
        (make_inputs, {"lengths": torch.tensor([-1, 2])}, r"lengths span -1 ... 2"),
        (make_inputs, {"dropout_p": 1.0}, r"dropout_p is 1.0; expected 0 <= dropout_p < 1"),
    ],
)
def test_bad_input_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        ops.relpos_attention(*inputs(), **options)


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("relative", [True, False])
def test_nothing_in_nothing_out(b, t, relative):
    shapes = [(b, t, H, D)] * 3 + [(max(2 * t - 1, 0), H, D), (H, D), (H, D)]
    inputs = [torch.randn(s, requires_grad=True) for s in shapes][: 6 if relative else 3]
    out = ops.relpos_attention(*inputs)
    assert out.shape == (b, t, H, D)
    for x, g in zip(inputs, torch.autograd.grad(out.sum(), inputs)):
        assert g.shape == x.shape
        assert (g == 0).all()


# --- registration, compilation, export -------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("permuted", "with_options"), [(False, False), (True, True)])
def test_opcheck(permuted, with_options):
    t = 5
    q, k, v, pos, u, v_bias = make_inputs(t=t, h=1, requires_grad=False)
    dout = torch.randn(B, t, 1, D)
    if permuted:
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
        pos = pos.transpose(0, 1).contiguous().transpose(0, 1)
    lengths, seed, p = (torch.tensor([5, 2]), torch.tensor([3]), 0.25) if with_options else (None, None, 0.0)
    inputs = (q, k, v, pos, u, v_bias, lengths, None, seed)
    torch.library.opcheck(torch.ops.lcconformer.relpos_attention_fwd.default, (*inputs, p))
    out, lse = torch.ops.lcconformer.relpos_attention_fwd(*inputs, p)
    torch.library.opcheck(torch.ops.lcconformer.relpos_attention_bwd.default, (dout, *inputs, p, out, lse))


def test_fake_tensors_of_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty(x.shape, device="cuda", dtype=torch.bfloat16) for x in make_inputs()]
        out, lse = torch.ops.lcconformer.relpos_attention_fwd(*inputs, None, None, None, 0.0)
    assert (out.shape, out.dtype, out.device.type) == ((B, T, H, D), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((H, B * T), torch.float32)


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("relative", [True, False])
def test_compiles_whole_and_once_for_all_lengths(which, relative, request):
    if which == "triton":
        request.getfixturevalue("interpreted")
    torch._dynamo.reset()

    def attend(*x: Tensor, lengths: Tensor) -> Tensor:
        return ops.relpos_attention(*x, lengths=lengths)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with backend(which):
        for step, t in enumerate((11, 19, 8)):
            inputs = make_inputs(t=t)[: 6 if relative else 3]
            lengths = torch.tensor([t, 3])
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                out = compiled(*inputs, lengths=lengths)
            want = attend(*inputs, lengths=lengths)
            assert torch.equal(out, want)
            for a, b in zip(gradients(out, inputs), gradients(want, inputs)):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


class _Attend(nn.Module):
    def forward(self, q, k, v, pos, u, v_bias, lengths):
        return ops.relpos_attention(q, k, v, pos, u, v_bias, lengths=lengths)


@pytest.mark.parametrize("which", ["torch", "triton"])
def test_exports_with_dynamic_frames(which, request):
    if which == "triton":
        request.getfixturevalue("interpreted")
    half = torch.export.Dim("half", min=2, max=500)
    frames = 2 * half
    shapes = [{1: frames}, {1: frames}, {1: frames}, {0: 2 * frames - 1}, None, None, None]
    inputs = make_inputs(t=12, requires_grad=False)
    dynamic = dict(zip(("q", "k", "v", "pos", "u", "v_bias", "lengths"), shapes))
    program = torch.export.export(_Attend(), (*inputs, torch.tensor([12, 5])), dynamic_shapes=dynamic)
    fresh = (*make_inputs(t=20, requires_grad=False), torch.tensor([20, 0]))
    assert torch.allclose(program.module()(*copy.deepcopy(fresh)), _Attend()(*fresh), atol=1e-6)


def test_plain_attention_matches_pytorch():
    q, k, v = make_inputs(requires_grad=False)[:3]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(ops.relpos_attention(q, k, v), want, atol=1e-6)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_gpu_compiled_training_step(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(ops.relpos_attention, fullgraph=True, dynamic=True)
    for t in (100, 203):
        inputs = [x.detach().cuda().requires_grad_() for x in make_inputs(dtype, t=t, d=64)]
        lengths = torch.tensor([t, 50], device="cuda")
        results = []
        for f in (compiled, ops.relpos_attention):
            out = f(*inputs, lengths=lengths)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        for a, b in zip(*results):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_no_synchronisation():
    inputs = [x.detach().cuda().requires_grad_() for x in make_inputs(torch.bfloat16, t=100, d=64)]
    lengths = torch.tensor([100, 50], device="cuda")
    ops.relpos_attention(*inputs, lengths=lengths, dropout_p=0.1).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.relpos_attention(*inputs, lengths=lengths, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_and_cpu_do_not_mix():
    inputs = make_inputs()
    inputs[0] = inputs[0].detach().cuda()
    with pytest.raises(ValueError, match="k is on cpu but q is on cuda"):
        ops.relpos_attention(*inputs)
