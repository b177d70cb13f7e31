"""Recorded training steps: buffers, keys and gradients on the CPU with a stand-in for CUDA graphs, and all of it on a GPU."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lcconformer import ConformerConfig, ConformerEncoder, captured_training, engine
from lcconformer.loop import captured

from ..conftest import with_random_values

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, dropout=0.0)
LENGTHS = torch.tensor([64, 20])


class Recorder:
    """In place of CUDA graphs: repeats the function on the static buffers, and counts."""

    recorded = replayed = 0

    def __init__(self, device) -> None:
        pass

    def warm_up(self, call):
        call()

    def capture(self, call):
        Recorder.recorded += 1
        call()

        def replay():
            Recorder.replayed += 1
            call()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    """Counts recordings and replays, where `with captured_training()` would use CUDA graphs."""
    monkeypatch.setattr(captured, "CudaGraphs", Recorder)
    monkeypatch.setattr(captured, "wanted", lambda x: captured._wanted.get())
    Recorder.recorded = Recorder.replayed = 0
    return Recorder


def make_encoder(**changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).double()
    with_random_values(encoder)
    return encoder


def data(frames=64):
    return torch.randn(2, frames, 16, dtype=torch.float64, requires_grad=True)


def loss_of(states, lengths=None):
    total = 0.0
    for i, h in enumerate(states, 1):
        weight = (torch.arange(h.numel()) * i).sin().to(h.dtype).view(h.shape)
        if lengths is not None:
            weight = weight * (torch.arange(h.shape[1]) < lengths[:, None])[..., None]
        total = total + (h * weight).sum()
    return total


def eagerly(encoder, x, lengths=None, **options):
    """Output and gradients of a step of the engine."""
    with engine("loop"):
        return finish(encoder, x, encoder(x, lengths, return_hidden_states=True, **options)[2], lengths)


def by_replay(encoder, x, lengths=None, **options):
    with engine("loop"), captured_training():
        states = encoder(x, lengths, return_hidden_states=True, **options)[2]
    assert type(states[-1].grad_fn).__name__ in ("_ReplayFnBackward", "SliceBackward0")
    return finish(encoder, x, states, lengths)


def finish(encoder, x, states, lengths):
    encoder.zero_grad()
    x.grad = None
    loss_of(states[1:], lengths).backward()
    gradients = [x.grad, *(p.grad for p in encoder.parameters())]
    return [h.detach() for h in states], [None if g is None else g.clone() for g in gradients]


def check(encoder, *args, **options):
    other = copy.deepcopy(encoder)
    seed = torch.get_rng_state()
    want = eagerly(other, *args, **options)
    torch.set_rng_state(seed)
    got = by_replay(encoder, *args, **options)
    for g, w in zip((*got[0], *got[1], *encoder.buffers()), (*want[0], *want[1], *other.buffers()), strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.equal(g, w)


OPTIONS = [{}, {"dropout": 0.3}, {"conv_norm": "batch"}, {"sharing": "cycle:2", "padding": "peer"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_same_numbers_at_any_depth(recorder, options, lengths):
    """Outputs, gradients, dropped elements and running statistics are those of the engine, recorded once for each depth."""
    encoder = make_encoder(**options)
    for depth in (3, 1, 3, 4, 1):
        check(encoder, data(), lengths, depth=depth)
    assert (recorder.recorded, recorder.replayed) == (2 * 3, 2 * 5)


def test_fewer_loops_with_gradients_and_checkpointing(recorder):
    encoder = make_encoder(dropout=0.2)
    check(encoder, data(), LENGTHS, backprop_depth=2)
    encoder.gradient_checkpointing = True
    check(encoder, data(), LENGTHS)
    encoder.layers[0].ffn1.up.weight.requires_grad_(False)
    check(encoder, data(), LENGTHS)
    assert recorder.recorded == 2 * 3


def test_layers_that_are_left_out_are_recorded_apart(recorder):
    encoder = make_encoder(sharing="none")
    for kept in ((0, 2), (1, 3), (0, 2)):
        with encoder.only(kept):
            want = eagerly(encoder, x := data(), depth=2)
            got = by_replay(encoder, x, depth=2)
        assert all(torch.equal(g, w) for g, w in zip(got[0], want[0], strict=True))
        assert [g is None for g in got[1]] == [w is None for w in want[1]]
    assert recorder.recorded == 4  # forward and backward of two selections


def test_lengths_are_rounded_up(recorder):
    """With padding masked all lengths up to the next multiple of 64 frames share a recording."""
    encoder = make_encoder(conv_norm="batch")
    for frames in (40, 64, 33):
        other, x, lengths = copy.deepcopy(encoder), data(frames), torch.tensor([frames, 7])
        want, got = eagerly(other, x, lengths), by_replay(encoder, x, lengths)
        real = torch.arange(frames) < lengths[:, None]
        for g, w in zip(got[0], want[0], strict=True):
            torch.testing.assert_close(g[real], w[real], rtol=0, atol=1e-10)
        for g, w in zip((*got[1], *encoder.buffers()), (*want[1], *other.buffers()), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-8)
    assert recorder.recorded == 2


def test_front_end_and_autocast(recorder):
    check(make_encoder(input_dim=10), torch.randn(2, 64, 10, dtype=torch.float64, requires_grad=True), LENGTHS)
    recorder.recorded = 0
    encoder, x = make_encoder().float(), torch.randn(2, 64, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        check(encoder, x, LENGTHS)
    check(encoder, x, LENGTHS)
    assert recorder.recorded == 2 * 2


def test_gradients_accumulate_and_last(recorder):
    """What a step leaves in ``.grad`` is its own memory: later steps add to it, and do not write over it."""
    encoder, batches = make_encoder(), [data(), data()]
    sums = [sum(pair) for pair in zip(*(eagerly(encoder, x)[1][1:] for x in batches))]
    encoder.zero_grad()
    with engine("loop"), captured_training():
        for x in batches:
            loss_of(encoder(x, return_hidden_states=True)[2][1:]).backward()
            kept = [p.grad.clone() for p in encoder.parameters()]
        encoder(data())
    for p, want, before in zip(encoder.parameters(), sums, kept, strict=True):
        assert torch.equal(p.grad, before)
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-9)


def test_steps_of_an_optimizer(recorder):
    """Weights that change in place need no new recording; ten steps at random depths end where the engine's end."""
    results = []
    for block in (False, True):
        torch.manual_seed(1)
        encoder = make_encoder(conv_norm="batch", dropout=0.1)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        for i in range(10):
            optimizer.zero_grad()
            with engine("loop"):
                if block:
                    with captured_training():
                        out = encoder(data(), LENGTHS, depth=1 + i % 2)[0]
                else:
                    out = encoder(data(), LENGTHS, depth=1 + i % 2)[0]
            out.square().mean().backward()
            optimizer.step()
        results.append(list(encoder.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert recorder.recorded == 2 * 2


def test_recorded_again(recorder):
    """Where a module's mode, a rate or a place in memory has changed."""
    encoder, x = make_encoder(dropout=0.2), data()
    check(encoder, x)
    encoder.layers[0].ffn1.dropout = 0.5
    check(encoder, x)
    encoder.layers[0].attention.eval()
    check(encoder, x)
    encoder.layers[0].norm.weight = torch.nn.Parameter(torch.randn(16, dtype=torch.float64))
    check(encoder, x)
    with torch.no_grad():
        encoder.layers[0].norm.weight.mul_(2)
    check(encoder, x)
    assert recorder.recorded == 2 * 4


def test_backwards_that_come_too_late(recorder):
    encoder = make_encoder()
    with engine("loop"), captured_training():
        first = encoder(data(), depth=2)[0].sum()
        second = encoder(data(), depth=3)[0].sum()
    second.backward(retain_graph=True)
    for loss in (first, second):
        with pytest.raises(
            RuntimeError, match=r"captured_training: another forward or backward .* backward\(\) once after"
        ):
            loss.backward()


def test_second_derivatives_are_refused(recorder):
    encoder, x = make_encoder(), data()
    with engine("loop"), captured_training():
        loss = encoder(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*captured_training"):
        gradient.sum().backward()


def test_no_more_steps_than_fit(recorder, monkeypatch):
    monkeypatch.setattr(captured, "STEPS", 2)
    encoder = make_encoder()
    for depth, recorded in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        by_replay(encoder, data(), depth=depth)
        assert recorder.recorded == 2 * recorded


def test_inside_of_ddp(recorder, tmp_path):
    """DDP's hooks see the gradients: in a world of one they leave them as they are."""
    encoder, x = make_encoder(), data()
    want = eagerly(copy.deepcopy(encoder), x, LENGTHS)[1][1:]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(encoder)
        for _ in range(2):
            encoder.zero_grad()
            with engine("loop"), captured_training():
                states = replica(x, LENGTHS, return_hidden_states=True)[2]
            loss_of(states[1:], LENGTHS).backward()
            assert all(torch.equal(p.grad, w) for p, w in zip(encoder.parameters(), want, strict=True))
    finally:
        torch.distributed.destroy_process_group()
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_recordings_end_with_the_encoder(monkeypatch, recorder):
    """As CUDA graphs do, this recorder keeps nothing of the functions."""

    def record(self, call):
        call()
        return lambda: None

    monkeypatch.setattr(Recorder, "capture", record)
    encoder = make_encoder()
    by_replay(encoder, data())
    steps = captured._kept[encoder]
    dead = weakref.ref(encoder), weakref.ref(steps)
    del encoder, steps
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


def test_where_it_changes_nothing():
    """On a CPU, in evaluation and on the modules."""
    encoder, x = make_encoder(), data()
    with captured_training():
        with engine("loop"):
            assert type(encoder(x)[0].grad_fn).__name__ == "LoopFnBackward"
        with torch.no_grad():
            encoder.eval()(x)
        assert captured._wanted.get()
    assert not captured._wanted.get()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    encoder = make_encoder(dropout=0.2, conv_norm="batch", d_model=64, ffn_dim=128).float().cuda()
    lengths = LENGTHS.cuda()
    for depth in (3, 1, 3, 2, 1):
        x = torch.randn(2, 64, 64, device="cuda", requires_grad=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            other, seed = copy.deepcopy(encoder), torch.cuda.get_rng_state()
            with engine("loop"):
                want = other(x, lengths, depth=depth)[0]
            torch.cuda.set_rng_state(seed)
            with engine("loop"), captured_training():
                got = encoder(x, lengths, depth=depth)[0]
        assert torch.equal(got, want)
        encoder.zero_grad()
        want.float().square().mean().backward()
        got.float().square().mean().backward()
        for p, q in zip(encoder.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        for p, q in zip(encoder.buffers(), other.buffers(), strict=True):
            assert torch.equal(p, q)
