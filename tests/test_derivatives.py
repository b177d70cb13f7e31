"""Per-sample gradients and second derivatives: kernels refuse them and say what has them, which is tested to have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder, extension, ops
from lcconformer.ops.samples import CALLS, Sizes

SIZES = Sizes(batch=2, frames=5, d_model=8, heads=2, ffn_dim=12, kernel_size=3)
CONFIG = ConformerConfig(d_model=8, num_heads=2, ffn_dim=12, num_layers=2, conv_kernel_size=3, dropout=0.0)
REMEDY = r'`with lcconformer\.backend\("torch"\)`, or set LCCONFORMER_BACKEND=torch'


@pytest.fixture
def kernels() -> None:
    if reason := extension.why_missing():
        pytest.skip(f"the CPU kernels are not here: {reason}")


def sample(op: str) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """(sum of squares of the op's outputs, its inputs by name)."""
    inputs: dict[str, Tensor] = {}
    lengths = torch.tensor([5, 2])

    def make(name: str, *shape: int) -> Tensor:
        inputs[name] = torch.randn(shape) / 2
        return inputs[name]

    CALLS[op](getattr(ops, op), make, SIZES, lengths)

    def loss(given: dict[str, Tensor]) -> Tensor:
        out = CALLS[op](getattr(ops, op), lambda name, *_: given[name], SIZES, lengths)
        outputs = out if isinstance(out, tuple) else (out,)
        return sum((o.square().sum() for o in outputs), torch.zeros(()))

    return loss, inputs


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.clone().requires_grad_() for n, x in inputs.items()}


def gradient_penalty(loss: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the squared norm of the gradients."""
    given = leaves(inputs)
    first = torch.autograd.grad(loss(given), list(given.values()), create_graph=True)
    penalty = sum((g.square().sum() for g in first), torch.zeros(()))
    return list(torch.autograd.grad(penalty, list(given.values()), allow_unused=True, materialize_grads=True))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", CALLS)
def test_second_derivatives_of_an_op(op):
    loss, inputs = sample(op)
    with pytest.raises(NotImplementedError, match=rf"{op}: the kernels have no second derivatives\. .*{REMEDY}"):
        gradient_penalty(loss, inputs)
    with lcconformer.backend("torch"):
        found = gradient_penalty(loss, inputs)
        assert torch.autograd.gradgradcheck(
            lambda *values: loss(dict(zip(inputs, values))),
            [x.double().requires_grad_() for x in inputs.values()],
            fast_mode=True,
        )
    assert all(g.isfinite().all() for g in found)


@pytest.mark.usefixtures("kernels")
def test_second_derivatives_where_the_first_are_of_a_sum():
    """Nothing that comes into the backward has a gradient."""
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
    out, _ = ops.residual_layer_norm(x, x.detach(), weight, bias)
    (first,) = torch.autograd.grad(ops.residual_layer_norm(x, out, weight, bias)[1].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="residual_layer_norm: the kernels have no second derivatives"):
        first.sum().backward()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", CALLS)
def test_gradients_of_an_op_per_sample(op):
    loss, inputs = sample(op)
    stacked = {n: torch.stack((x, 2 * x, -x)) for n, x in inputs.items()}
    for transform, given in ((grad(loss), inputs), (vmap(grad(loss)), stacked)):
        with pytest.raises(NotImplementedError, match=rf"{op}: .* transforms of torch\.func .*{REMEDY}"):
            transform(given)
    with lcconformer.backend("torch"):
        found = vmap(grad(loss))(stacked)
    for i in range(3):
        given = leaves({n: x[i] for n, x in stacked.items()})
        want = torch.autograd.grad(loss(given), list(given.values()))
        for name, w in zip(given, want):
            torch.testing.assert_close(found[name][i], w, rtol=1e-3, atol=1e-4)


def encoder_loss(encoder: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        out, _ = functional_call(encoder, parameters, (x[None], lengths[None]))
        real = torch.arange(x.shape[0]) < lengths
        return out.square().mul(torch.arange(8.0)).masked_fill(~real[:, None], 0.0).sum()

    return loss


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("position", ["relative", "none"])
def test_gradients_of_an_encoder_per_sample(position):
    encoder = ConformerEncoder(CONFIG.replace(position=position))
    x, lengths = torch.randn(3, 7, 8), torch.tensor([7, 4, 1])
    parameters, loss = dict(encoder.named_parameters()), encoder_loss(encoder)
    per_sample = vmap(grad(loss), (None, 0, 0))
    with pytest.raises(NotImplementedError, match=REMEDY):
        per_sample(parameters, x, lengths)
    with lcconformer.backend("torch"):
        found = per_sample(parameters, x, lengths)
    for i in range(3):
        want = torch.autograd.grad(loss(parameters, x[i], lengths[i]), list(parameters.values()))
        for name, w in zip(parameters, want):
            torch.testing.assert_close(found[name][i], w, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_second_derivatives_of_an_encoder():
    encoder = ConformerEncoder(CONFIG)
    inputs, lengths = {"x": torch.randn(3, 7, 8)}, torch.tensor([7, 4, 1])

    def loss(given: dict[str, Tensor]) -> Tensor:
        return (encoder(given["x"], lengths)[0] * torch.arange(8.0)).sum()

    with lcconformer.engine("modules"), pytest.raises(NotImplementedError, match=REMEDY):
        gradient_penalty(loss, inputs)
    message = r'ConformerEncoder: .* `with lcconformer\.engine\("modules"\), lcconformer\.backend\("torch"\)`'
    with lcconformer.engine("loop"), pytest.raises(NotImplementedError, match=message):
        gradient_penalty(loss, inputs)
    with lcconformer.engine("modules"), lcconformer.backend("torch"):
        found = gradient_penalty(loss, inputs)
        encoder.double()
        want = gradient_penalty(loss, {"x": inputs["x"].double()})
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-2, atol=1e-3 * want[0].abs().max().item())


@pytest.mark.usefixtures("kernels")
def test_a_graph_of_the_gradients_costs_nothing_but_their_gradients():
    loss, inputs = sample("feed_forward")
    first, second = leaves(inputs), leaves(inputs)
    want = torch.autograd.grad(loss(first), list(first.values()))
    got = torch.autograd.grad(loss(second), list(second.values()), create_graph=True)
    for g, w in zip(got, want):
        assert torch.equal(g, w)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, {"position": "none", "conv_norm": "batch"}], ids=str)
def test_fake_tensors(training, changes):
    """A whole encoder without memory, for estimates: shapes and dtypes, no values."""
    with FakeTensorMode():
        encoder = ConformerEncoder(CONFIG.replace(dropout=0.1, **changes)).train(training)
        x, lengths = torch.randn(3, 7, 8), torch.tensor([7, 4, 1])
        with torch.set_grad_enabled(training):
            out, out_lengths = encoder(x, lengths)
        assert (out.shape, out.dtype, out_lengths.shape) == ((3, 7, 8), torch.float32, (3,))
        if training:
            out.sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in encoder.parameters())


def test_fake_packed_utterances():
    with FakeTensorMode():
        q = torch.randn(9, 2, 4)
        position = torch.randn(9, 2, 4), torch.randn(2, 4), torch.randn(2, 4)
        out = ops.relpos_attention(q, q, q, *position, cu_seqlens=torch.tensor([0, 5, 9]))
        assert out.shape == (9, 2, 4)


@pytest.mark.parametrize(("batch", "frames"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("op", CALLS)
def test_gradients_of_nothing(op, batch, frames):
    """Zeros for every input, on whatever backend: a parameter without a gradient would stop an optimizer's foreach."""
    inputs: dict[str, Tensor] = {}

    def make(name: str, *shape: int) -> Tensor:
        inputs[name] = torch.randn([max(n, 0) for n in shape]).requires_grad_()
        return inputs[name]

    sizes = Sizes(batch=batch, frames=frames, d_model=8, heads=2, ffn_dim=12, kernel_size=3)
    for name in ("torch", "cpu") if extension.why_missing() is None else ("torch",):
        inputs.clear()
        with lcconformer.backend(name):
            out = CALLS[op](getattr(ops, op), make, sizes, torch.full((batch,), frames))
        outputs = out if isinstance(out, tuple) else (out,)
        sum((o.sum() for o in outputs), torch.zeros(())).backward()
        assert [n for n, x in inputs.items() if x.grad is None or x.grad.count_nonzero()] == [], name
