"""The training engine against the autograd of the modules: outputs, gradients, state, memory."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine
from lcconformer.loop import shared_layer, training

from ..conftest import with_random_values

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, dropout=0.0)
LENGTHS = torch.tensor([9, 4, 0])
SHARINGS = ["all", "none", "sequence:2", "cycle:2", (0, 1, 1, 0)]


def make_encoder(dtype=torch.float32, **changes) -> ConformerEncoder:
    """An encoder with nothing at its initial value."""
    encoder = ConformerEncoder(BASE.replace(**changes)).to(dtype)
    with_random_values(encoder)
    return encoder


def loss_of(states, lengths=None):
    """Every hidden state with weights of its own, over real frames."""
    total = 0.0
    for i, h in enumerate(states, 1):
        weight = (torch.arange(h.numel()) * i).sin().to(h.dtype).view(h.shape)
        if lengths is not None:
            weight = weight * (torch.arange(h.shape[1]) < lengths[:, None])[..., None]
        total = total + (h * weight).sum()
    return total


def step(encoder, x, lengths, name, last=False, **options):
    """(outputs, gradients by name) of a step on an engine; with ``last`` the loss sees the output alone."""
    encoder.zero_grad()
    x = x.detach().requires_grad_()
    with engine(name):
        out, _, states = encoder(x, lengths, return_hidden_states=True, **options)
    loss_of([out] if last else states[1:], lengths).backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters()} | {"x": x.grad}
    return [h.detach() for h in states], {n: None if g is None else g.clone() for n, g in gradients.items()}


def check_exact(encoder, x, lengths, tolerance=1e-10, **options):
    """In float64 the engine equals the modules, and moves their buffers as they do."""
    other = copy.deepcopy(encoder)
    want, gradients = step(encoder, x, lengths, "modules", **options)
    got, found = step(other, x, lengths, "loop", **options)
    assert len(got) == len(want)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0, atol=tolerance)
    # a bias in front of a BatchNorm has a gradient of zero, to rounding errors of the others
    scale = max(g.abs().max().item() for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            largest = max(gradient.abs().max().item(), 1e-3 * scale)
            error = (found[name] - gradient).abs().max().item()
            assert error <= tolerance * largest, f"{name}: {error:.2e} of {largest:.2e}"
    for name, buffer in encoder.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer, rtol=0, atol=1e-12)


def data(dtype=torch.float64, frames=9):
    return torch.randn(3, frames, 16, dtype=dtype)


@pytest.mark.parametrize("padding", ["masked", "peer"])
@pytest.mark.parametrize("norm", ["layer", "batch", "group", "none"])
@pytest.mark.parametrize("convolution_first", [False, True])
def test_equals_the_modules(norm, padding, convolution_first):
    changes = {"conv_norm": norm, "padding": padding, "convolution_first": convolution_first, "conv_norm_groups": 2}
    encoder = make_encoder(torch.float64, **changes)
    lengths = torch.tensor([9, 4, 1]) if norm == "batch" and padding == "peer" else LENGTHS
    check_exact(encoder, data(), lengths)
    check_exact(encoder.eval(), data(), None, last=True)


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_sharing_maps_and_depths(sharing, depth):
    check_exact(make_encoder(torch.float64, sharing=sharing), data(), LENGTHS, depth=depth)


def test_without_biases():
    check_exact(make_encoder(torch.float64, attention_bias=False, conv_bias=False), data(), LENGTHS)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations(activation):
    check_exact(make_encoder(torch.float64, activation=activation), data(), LENGTHS)


def test_front_end_and_single_frame():
    encoder = make_encoder(torch.float64, input_dim=10, subsampling="conv", subsampling_factor=4)
    check_exact(encoder, torch.randn(3, 21, 10, dtype=torch.float64), torch.tensor([21, 9, 1]))
    check_exact(make_encoder(torch.float64), data(frames=1), None)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("loops", [2, 3, 100])
def test_products_over_several_loops(monkeypatch, loops, on_gpu):
    """A matrix gets its gradient from several loops at once, also where the last product has fewer."""
    monkeypatch.setattr(training, "_group", lambda *_: loops)
    monkeypatch.setattr(training, "_on_gpu", lambda _: on_gpu)
    for sharing in ("all", "cycle:2"):
        encoder = make_encoder(torch.float64, sharing=sharing)
        check_exact(encoder, data(), LENGTHS)
        check_exact(encoder, data(), LENGTHS, backprop_depth=3)
        encoder.gradient_checkpointing = True
        check_exact(encoder, data(), LENGTHS)


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_over_several_loops_with_unused_outputs(monkeypatch, loops, checkpointing):
    """A loss on the output of loop 2 of 4, with groups that begin in the middle; saved tensors that come back as copies."""
    monkeypatch.setattr(training, "_group", lambda *_: loops)
    encoder, x = make_encoder(torch.float64), data()
    _, want = step(encoder, x, LENGTHS, "modules", last=True, depth=2)
    encoder.zero_grad()
    encoder.gradient_checkpointing = checkpointing
    with engine("loop"), torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        states = encoder(x, LENGTHS, return_hidden_states=True)[2]
    loss_of([states[2]], LENGTHS).backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-10, atol=1e-10)


# float32 and half precision


def as_low(encoder, x, lengths, **options):
    """What the references give in the dtype of ``x``."""
    with backend("torch"):
        return step(copy.deepcopy(encoder), x, lengths, "modules", **options)


CPU = [("cpu", norm, padded) for norm in ("layer", "batch", "group") for padded in (True, False)]


@pytest.mark.parametrize(
    ("name", "norm", "padded", "activation"),
    [
        *((*each, "silu") for each in CPU),
        ("cpu", "layer", True, "gelu"),
        ("triton", "layer", True, "silu"),
        ("triton", "batch", False, "silu"),
    ],
    ids=str,
)
def test_fused(name, norm, padded, activation, assert_close, monkeypatch):
    """On the fused kernels: no further from float64 than the references are, by the tolerance rule."""
    loops = 2 if name == "triton" else 3
    if name == "triton":
        # the slabs and the sums of a GPU
        monkeypatch.setattr(training, "_group", lambda *_: 2)
        monkeypatch.setattr(training, "_on_gpu", lambda _: True)
    sharing = "all" if name == "triton" else "cycle:2"
    changes = {"conv_norm": norm, "sharing": sharing, "num_layers": loops, "activation": activation}
    encoder, x = make_encoder(**changes), data(torch.float32)
    lengths = LENGTHS if padded else None
    low, low_gradients = as_low(encoder, x, lengths)
    exact, exact_gradients = step(copy.deepcopy(encoder).double(), x.double(), lengths, "modules")
    with backend(name):
        states, gradients = step(encoder, x, lengths, "loop")
    real = torch.ones(3, 9, dtype=torch.bool) if lengths is None else torch.arange(9) < lengths[:, None]
    for k, (h, e, lo) in enumerate(zip(states, exact, low)):
        assert_close(f"hidden state {k}", h[real], e[real], lo[real], 2)
    # gradients are sums over frames and loops of terms larger than they are
    scale = max(g.abs().max().item() for n, g in exact_gradients.items() if n != "x")
    for p, gradient in gradients.items():
        assert_close(p, gradient, exact_gradients[p], low_gradients[p], 3, 0.0 if p == "x" else scale)


def check_low(got, plain, exact, dtype, of_gradients=None):
    """(outputs, gradients): as close to float32's as those of the modules are, in the dtypes wanted."""
    lengths = LENGTHS.to(got[0][0].device)
    real = torch.arange(9, device=lengths.device) < lengths[:, None]
    for h, p, e in zip(got[0], plain[0], exact[0]):
        assert h.dtype == dtype
        assert (h.float() - e)[real].norm() <= 2 * (p.float() - e)[real].norm() + 1e-3 * e[real].norm()
    whole = torch.stack([g.norm() for g in exact[1].values()]).norm()
    for name, gradient in got[1].items():
        assert gradient.dtype == (of_gradients or dtype), name
        want = exact[1][name]
        error, others = (gradient.float() - want).norm(), (plain[1][name].float() - want).norm()
        assert error <= 2 * others + 0.01 * want.norm() + 1e-3 * whole, name


def test_autocast_behind_a_front_end():
    """A front end leaves the stream in the dtype of autocast; the parameters are float32 all the same."""
    encoder, x = make_encoder(num_layers=2, input_dim=10), torch.randn(3, 9, 10)
    exact = step(copy.deepcopy(encoder), x, LENGTHS, "modules")
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(copy.deepcopy(encoder), x, LENGTHS, "modules")
        got = step(encoder, x, LENGTHS, "loop")
    # the gradient of the front end's input is float32
    check_low(got, plain, exact, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("cpu", torch.bfloat16), ("triton", torch.float16)], ids=str)
def test_autocast(name, dtype):
    """Products in half precision, the residual stream and gradients as they are without."""
    encoder, x = make_encoder(num_layers=2, dropout=0.0), data(torch.float32)
    exact = step(copy.deepcopy(encoder), x, LENGTHS, "modules")
    with torch.autocast("cpu", dtype):
        with backend("torch"):
            plain = step(copy.deepcopy(encoder), x, LENGTHS, "modules")
        with backend(name):
            got = step(encoder, x, LENGTHS, "loop")
    check_low(got, plain, exact, torch.float32)


def test_backward_under_autocast():
    """What the forward computed in float32 has gradients in float32."""
    encoder, x = make_encoder(), data(torch.float32)
    _, want = step(encoder, x, None, "loop", last=True)
    encoder.zero_grad()
    with engine("loop"):
        loss = loss_of([encoder(x)[0]])
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in encoder.named_parameters() if not n.endswith("pos.weight"))


def test_bfloat16_module():
    encoder, x = make_encoder(num_layers=3), data(torch.float32)
    exact = step(copy.deepcopy(encoder), x, LENGTHS, "modules")
    encoder = encoder.bfloat16()
    plain = step(copy.deepcopy(encoder), x.bfloat16(), LENGTHS, "modules")
    check_low(step(encoder, x.bfloat16(), LENGTHS, "loop"), plain, exact, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype):
    encoder, x, lengths = (
        make_encoder(num_layers=3, conv_norm="batch").cuda(),
        data(torch.float32).cuda(),
        LENGTHS.cuda(),
    )
    with backend("torch"):
        exact = step(copy.deepcopy(encoder), x, lengths, "modules")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        plain = step(copy.deepcopy(encoder), x, lengths, "modules")
        with backend("triton"):
            got = step(encoder, x, lengths, "loop")
    check_low(got, plain, exact, torch.float32)


def test_gradients_do_not_depend_on_threads():
    encoder, x = make_encoder(), data(torch.float32, frames=33)
    results = []
    for threads in (1, 3, 1):
        torch.set_num_threads(threads)
        results.append(step(encoder, x, LENGTHS, "loop")[1])
    torch.set_num_threads(1)
    assert all(torch.equal(results[0][n], results[2][n]) for n in results[0])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-4)


# dropout


def test_dropout_gradients_by_finite_differences():
    """With the masks of the forward: in float64 along a random direction of everything."""
    encoder = make_encoder(torch.float64, dropout=0.3, num_layers=2)
    x, lengths = data().requires_grad_(), LENGTHS
    inputs = [x, *encoder.parameters()]
    directions = [torch.randn_like(p) for p in inputs]

    def loss(by):
        moved = [p.detach().add(v, alpha=by).requires_grad_() for p, v in zip(inputs, directions)]
        named = dict(zip([n for n, _ in encoder.named_parameters()], moved[1:]))
        torch.manual_seed(5)
        with engine("loop"):
            states = torch.func.functional_call(
                encoder, named, (moved[0], lengths), {"return_hidden_states": True}, strict=True
            )[2]
        return loss_of(states[1:], lengths), moved

    value, leaves = loss(0.0)
    gradients = torch.autograd.grad(value, leaves)
    want = (loss(1e-6)[0] - loss(-1e-6)[0]).item() / 2e-6
    got = sum((g * v).sum() for g, v in zip(gradients, directions)).item()
    assert got == pytest.approx(want, rel=1e-6)


def drawn(encoder, x, sites):
    """The seeds that a run gives to each site, ``[N, 8]``."""
    found = []
    original = training._Call.seeds

    def spy(call, seeds, k):
        found.append(original(call, seeds, k))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Call, "seeds", spy)
        with engine("loop"):
            encoder(x)
    return [[None if s is None else int(s) for s in loop] for loop in found]


def test_every_site_and_loop_has_a_seed_of_its_own():
    encoder, x = make_encoder(dropout=0.3), data(torch.float32)
    seeds = drawn(encoder, x, 8)
    flat = [s for loop in seeds for i, s in enumerate(loop) if i != 2]  # nothing is dropped inside of the convolution
    assert len(flat) == 4 * 7
    assert None not in flat
    assert len(set(flat)) == len(flat)
    assert [loop[2] for loop in seeds] == [None] * 4
    encoder.layers[0].attention.dropout = 0.0
    assert [loop[1] for loop in drawn(encoder, x, 8)] == [None] * 4
    assert all(s is None for loop in drawn(encoder.eval(), x, 8) for s in loop)


@pytest.mark.parametrize("convolution_first", [False, True])
def test_each_module_has_its_own_rate_and_mode(convolution_first):
    (layer,) = make_encoder(dropout=0.1, convolution_first=convolution_first).layers
    layer.ffn1.dropout, layer.attention.dropout, layer.ffn2.dropout = 0.2, 0.3, 0.4
    plan = shared_layer.plan_of(layer)
    assert plan.inside == ((0.2, 0.0, 0.3, 0.4) if convolution_first else (0.2, 0.3, 0.0, 0.4))
    assert plan.on == (0.2, 0.1, 0.1, 0.4)
    layer.ffn1.eval(), layer.attention.eval()
    plan = shared_layer.plan_of(layer)
    assert plan.inside == (0.0, 0.0, 0.0, 0.4)
    assert plan.on == (0.0, 0.1, 0.1, 0.4)


def test_frozen_statistics():
    """BatchNorm of a convolution module in evaluation, the rest in training."""
    encoder = make_encoder(torch.float64, conv_norm="batch")
    encoder.layers[0].conv.eval()
    check_exact(encoder, data(), LENGTHS)


@pytest.mark.parametrize("convolution_first", [False, True])
def test_dropout_on_the_fused_kernels(convolution_first):
    """Output and gradients are those of the plain layer with the very masks the kernels draw."""
    from lcconformer.ops.feed_forward import cpu as feed_forward
    from lcconformer.ops.relpos_attention import RelposAttention
    from lcconformer.ops.relpos_attention import cpu as relpos_attention
    from lcconformer.ops.residual_layer_norm import ResidualLayerNorm
    from lcconformer.ops.residual_layer_norm import cpu as residual_layer_norm

    encoder = make_encoder(dropout=0.4, num_layers=2, num_heads=1, convolution_first=convolution_first)
    (layer,), x, p = encoder.layers, data(torch.float32), 0.4
    x.requires_grad_()
    torch.manual_seed(7)
    seeds = torch.randint(-(2**63), 2**63 - 1, (2, 8), dtype=torch.int64)

    def on(seed):
        ones = torch.ones(27, 16)
        call = ResidualLayerNorm(0 * ones, ones, ones[0], ones[0], seed, 1.0, p, 1e-5)
        return residual_layer_norm.forward(call)[0].view(3, 9, 16)

    def inside(seed):
        large = torch.full((27, 24), 100.0)
        return (feed_forward.activation(large, None, seed, p, "silu") / 100).view(3, 9, 24)

    def of_weights(seed):  # [B, H, T, T]
        q = torch.zeros(3, 9, 1, 16)
        v = torch.eye(9, 16)[None, :, None].expand(3, 9, 1, 16).contiguous()
        out, _ = relpos_attention.forward(RelposAttention(q, q, v, None, None, None, None, None, seed, p))
        return 9 * out[..., :9].transpose(1, 2)

    masks = []
    for k in range(2):
        s = [seeds[k, i : i + 1] for i in range(8)]
        branches = ["ffn1", "conv", "attention", "ffn2"] if convolution_first else ["ffn1", "attention", "conv", "ffn2"]
        for i, branch in enumerate(branches):
            # in the order in which plain modules ask for them
            masks += [] if branch == "conv" else [of_weights(s[i]) if branch == "attention" else inside(s[i])]
            masks.append(on(s[4 + i]))
    assert all(0.3 < (m == 0).float().mean() < 0.5 for m in masks)

    def masked(value, p=0.5, training=True, inplace=False):
        if p == 0.0:
            return value
        mask = next(asked)
        assert mask.shape == value.shape
        return value * mask

    results = []
    for name in ("loop", "modules"):
        asked = iter(masks)
        torch.manual_seed(7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "dropout", masked)
            with engine(name), backend("cpu" if name == "loop" else "torch"):
                states = encoder(x, return_hidden_states=True)[2][1:]
        parameters = [x, *layer.parameters()]
        results.append([*states, *torch.autograd.grad(loss_of(states), parameters)])
        assert (next(asked, None) is None) == (name == "modules")
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4 * max(1.0, want.abs().max().item()))


# less memory: checkpointing, truncation


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", ["modules", "loop"])
def test_gradient_checkpointing_changes_nothing_else(name, norm):
    encoder = make_encoder(torch.float64, conv_norm=norm, dropout=0.2, sharing="cycle:2")
    results = []
    for checkpointing in (False, True):
        run = copy.deepcopy(encoder)
        run.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        states, gradients = step(run, data().fill_(1).cumsum(1), LENGTHS, name)
        results.append([*states, *gradients.values(), *run.buffers()])
    for got, want in zip(*results):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backprop_depth", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backprop_depth(backprop_depth, checkpointing):
    """Gradients of the last loops alone: those of these loops run on the hidden state where they begin."""
    encoder, x = make_encoder(torch.float64, conv_norm="batch", sharing="cycle:2"), data()
    encoder.gradient_checkpointing = checkpointing
    check_exact(encoder, x, LENGTHS, backprop_depth=backprop_depth)
    encoder = make_encoder(torch.float64)
    for name in ("modules", "loop"):
        states, gradients = step(encoder, x, None, name, last=True, backprop_depth=backprop_depth)
        _, want = step(encoder, states[4 - backprop_depth], None, "modules", last=True, depth=backprop_depth)
        assert (gradients["x"] is None) == (backprop_depth < 4)
        for parameter in dict(encoder.named_parameters()):
            torch.testing.assert_close(gradients[parameter], want[parameter], rtol=1e-9, atol=1e-9)


def test_hidden_states_before_the_last_loops_have_no_gradient():
    encoder = make_encoder()
    for name in ("modules", "loop"):
        with engine(name):
            states = encoder(data(torch.float32), return_hidden_states=True, backprop_depth=2)[2]
        assert [h.requires_grad for h in states] == [False, False, False, True, True]
    encoder.requires_grad_(False)  # then there is nothing to learn, also if the input wants a gradient
    for name in ("modules", "loop"):
        with engine(name):
            assert not encoder(data(torch.float32).requires_grad_(), backprop_depth=2)[0].requires_grad


@pytest.mark.parametrize("value", [0, 3, True, 1.0])
def test_backprop_depth_out_of_range(value):
    message = rf"backprop_depth is {value!r}; expected an integer from 1 to depth = 2"
    with pytest.raises(ValueError, match=message):
        make_encoder()(data(torch.float32), depth=2, backprop_depth=value)


def held_by(encoder, x, name):
    """Bytes a forward keeps for its backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (x, *encoder.parameters())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with engine(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = encoder(x)[0]
    del out
    gc.collect()
    return sum(found.values())


def test_memory_kept_for_the_backward():
    """18 d_model a frame and loop (and a few statistics); the input of each loop with checkpointing."""
    encoder = make_encoder(d_model=64, ffn_dim=256, num_heads=1, dropout=0.1)
    x = torch.randn(2, 300, 64)
    unit = 4 * x.numel()
    assert held_by(encoder, x, "loop") <= (18.5 * 4 + 1) * unit
    assert held_by(encoder, x, "modules") >= 21 * 4 * unit
    encoder.gradient_checkpointing = True
    assert held_by(encoder, x, "loop") <= (1 * 4 + 1) * unit


# autograd's own business


def test_input_without_gradient_and_frozen_parameters():
    encoder, x = make_encoder(torch.float64), data()
    _, want = step(encoder, x, LENGTHS, "modules")
    frozen = ["ffn1.up.weight", "attention.qkv.weight", "attention.qkv.bias", "conv.norm.bias", "conv.depthwise.weight"]
    frozen += ["ffn2.down.bias", "attention.u", "attention.pos.weight", "norm.weight"]
    for name in frozen:
        encoder.layers[0].get_parameter(name).requires_grad_(False)
    encoder.zero_grad()
    with engine("loop"):
        states = encoder(x, LENGTHS, return_hidden_states=True)[2]
    loss_of(states[1:], LENGTHS).backward()
    for name, parameter in encoder.layers[0].named_parameters():
        assert (parameter.grad is None) == (name in frozen)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[f"layers.0.{name}"], rtol=1e-10, atol=1e-10)


def test_frozen_layer_makes_no_products(monkeypatch):
    encoder, x = make_encoder(), data(torch.float32).requires_grad_()
    _, want = step(encoder, x, None, "modules")
    encoder.requires_grad_(False)
    monkeypatch.setattr(torch, "mm", None)  # weight gradients go through it
    with engine("loop"):
        states = encoder(x, return_hidden_states=True)[2]
    (gradient,) = torch.autograd.grad(loss_of(states[1:]), x)
    torch.testing.assert_close(gradient, want["x"], rtol=1e-4, atol=1e-4)


def test_gradients_accumulate():
    encoder = make_encoder(torch.float64)
    batches = [data(), data()]
    sums = {}
    for x in batches:
        for name, gradient in step(encoder, x, LENGTHS, "modules")[1].items():
            sums[name] = sums.get(name, 0) + gradient
    encoder.zero_grad()
    with engine("loop"):
        for x in batches:
            loss_of(encoder(x, LENGTHS, return_hidden_states=True)[2][1:], LENGTHS).backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], rtol=1e-10, atol=1e-10)


def test_unused_deeper_hidden_states():
    """A loss on the output of loop 2 of 4 has the gradients of a run of 2 loops."""
    encoder, x = make_encoder(torch.float64), data()
    _, want = step(encoder, x, LENGTHS, "modules", last=True, depth=2)
    encoder.zero_grad()
    with engine("loop"):
        states = encoder(x, LENGTHS, return_hidden_states=True)[2]
    loss_of([states[2]], LENGTHS).backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-10, atol=1e-10)


def test_backward_twice():
    encoder, x = make_encoder(), data(torch.float32)
    with engine("loop"):
        loss = loss_of([encoder(x)[0]])
    first = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    encoder, x = make_encoder(), data(torch.float32).requires_grad_()
    with engine("loop"):
        loss = encoder(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*engine\(.modules.\)"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["ffn1.up.weight", "attention.out.bias", "conv.depthwise_norm.running_var"])
def test_weights_changed_before_the_backward_are_noticed(name):
    encoder = make_encoder(conv_norm="batch").eval()
    layer = encoder.layers[0]
    with engine("loop"):
        loss = loss_of([encoder(data(torch.float32))[0]])
    with torch.no_grad():
        (dict(layer.named_parameters()) | dict(layer.named_buffers()))[name].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_forwards_in_a_row_before_their_backwards():
    """Statistics move with each forward; that must not trouble the backward of the one before."""
    encoder, x = make_encoder(conv_norm="batch"), data(torch.float32)
    with engine("loop"):
        first, second = (loss_of([encoder(x)[0]]) for _ in range(2))
    (first + second).backward()


def test_output_may_be_changed_in_place():
    encoder, x = make_encoder(), data(torch.float32)
    with engine("loop"):
        out, _, states = encoder(x, return_hidden_states=True)
        plain = encoder(x)[0]
    states[2].mul_(2)
    (out.add_(1).sum() + states[2].sum() + plain.relu_().sum()).backward()


@pytest.mark.parametrize("name", ["auto", "loop", "modules"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_it(name, reentrant):
    """A reentrant pass runs without gradients first, and must drop what the recomputation drops."""
    encoder, x = make_encoder(dropout=0.3), data(torch.float32).requires_grad_()
    leaves, results = [x, *encoder.parameters()], []
    for options in (None, {"use_reentrant": reentrant}):
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        with engine(name):
            out, *_ = encoder(x, LENGTHS) if options is None else checkpoint(encoder, x, LENGTHS, **options)
            loss_of([out], LENGTHS).backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing_is_kept_without_gradients(monkeypatch):
    """The output of attention is written where the backward would find it, or nowhere in particular."""
    encoder, x, kept = make_encoder(dropout=0.3), data(torch.float32), []
    forward = shared_layer.SharedLayer.forward

    def watched(self, *args, attended=None, **options):
        kept.append(attended is not None)
        return forward(self, *args, attended=attended, **options)

    monkeypatch.setattr(shared_layer.SharedLayer, "forward", watched)
    with engine("loop"):
        encoder(x)
        assert kept == [True] * 4
        with torch.no_grad():
            encoder(x)
        assert kept[4:] == [False] * 4


def test_gradients_that_are_not_contiguous():
    encoder, x = make_encoder(torch.float64), data()
    results = []
    for name in ("modules", "loop"):
        encoder.zero_grad()
        with engine(name):
            out = encoder(x.transpose(0, 1).contiguous().transpose(0, 1))[0]
        (out.sum((0, 1)) * torch.arange(16)).sum().backward()
        results.append([p.grad for p in encoder.parameters()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_steps_of_an_optimizer():
    """Ten steps end where the modules end."""
    results = []
    for name in ("modules", "loop"):
        torch.manual_seed(1)
        encoder = make_encoder(torch.float64, conv_norm="batch")
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        losses = []
        for i in range(10):
            optimizer.zero_grad()
            with engine(name):
                loss = encoder(data(), LENGTHS, depth=1 + i % 4)[0].square().sum() + 0.1 * i
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-8)
