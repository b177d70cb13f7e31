"""The engine of recorded graphs: its buffers and keys on the CPU with a stand-in, and all of it on a GPU."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine
from lcconformer.loop import graphs

from ..conftest import with_random_values

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, dropout=0.1)


class Recorder:
    """In place of CUDA graphs: repeats the function on the static buffers, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call):
        self.recorded += 1
        call()  # a warm-up leaves its marks in the buffers too

        def replay():
            self.replayed += 1
            call()

        return replay


def make_encoder(**changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).eval()
    with_random_values(encoder)
    return encoder


@torch.no_grad()
def by_modules(encoder, x, lengths=None):
    with engine("modules"):
        return encoder(x, lengths, return_hidden_states=True)[2][1:]


def by_graphs(encoder, x, lengths=None, depth=4, record=None):
    entered, lengths = encoder._enter(x, lengths)
    return graphs.run(encoder, entered, lengths, depth, True, record or Recorder())


def check(encoder, x, lengths=None, depth=4, record=None):
    outputs = by_graphs(encoder, x, lengths, depth, record)
    assert len(outputs) == depth
    for out, ref in zip(outputs, by_modules(encoder, x, lengths)):
        real = torch.arange(x.shape[1]) < (torch.full((len(x),), x.shape[1]) if lengths is None else lengths)[:, None]
        torch.testing.assert_close(out[real], ref[real], rtol=0, atol=2e-5)


OPTIONS = [
    {},
    {"position": "rotary"},
    {"position": "none", "convolution_first": True},
    {"conv_norm": "group", "sharing": "cycle:2"},
    {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    {"conditioning": ("step", "lora")},
    {"padding": "peer"},
    {"padding": "peer", "conv_norm": "batch"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 7])], ids=["whole", "lengths"])
def test_equals_the_modules(options, lengths):
    encoder = make_encoder(**options)
    for depth in (2, 4, 1):
        check(encoder, torch.randn(2, 40, 16), lengths, depth)


def test_records_a_layer_once_for_all_loops_and_depths():
    encoder, record = make_encoder(), Recorder()
    for depth in (1, 4, 2):
        check(encoder, torch.randn(2, 40, 16), depth=depth, record=record)
    # the projection of positions, and one layer
    assert record.recorded == 2
    assert record.replayed == 3 + 1 + 4 + 2


@pytest.mark.parametrize(
    ("options", "layers"),
    [({"sharing": "cycle:2"}, 2), ({"conditioning": ("step",)}, 4), ({"sharing": "none"}, 4)],
    ids=str,
)
def test_records_what_differs(options, layers):
    encoder, record = make_encoder(**options), Recorder()
    check(encoder, torch.randn(2, 40, 16), record=record)
    assert record.recorded == 1 + layers


def test_frames_go_by_buckets_where_padding_never_leaks():
    encoder, record = make_encoder(), Recorder()
    # the long one first: what it leaves in the buffers must not reach the others
    for frames in (64, 33, 1, 63):
        check(encoder, 10 * torch.randn(2, frames, 16), record=record)
        check(encoder, torch.randn(2, frames, 16), torch.tensor([frames, 1]), record=record)
    assert record.recorded == 2
    check(encoder, torch.randn(2, 65, 16), record=record)
    check(encoder, torch.randn(3, 64, 16), record=record)
    assert record.recorded == 6


def test_frames_are_exact_where_padding_leaks():
    encoder, record = make_encoder(padding="peer"), Recorder()
    for frames in (64, 63):
        check(encoder, torch.randn(2, frames, 16), record=record)
        check(encoder, torch.randn(2, frames, 16), torch.tensor([frames, 5]), record=record)
    assert record.recorded == 2 * 2 * 2


def test_infinities_of_an_earlier_call_are_gone():
    encoder, record = make_encoder(), Recorder()
    with backend("torch"):  # other kernels may not even look at the padding
        by_graphs(encoder, torch.full((2, 64, 16), torch.inf), record=record)
        check(encoder, torch.randn(2, 40, 16), record=record)


def test_outputs_are_not_written_again():
    encoder, record, x = make_encoder(), Recorder(), torch.randn(2, 40, 16)
    outputs = by_graphs(encoder, x, record=record)
    kept = [out.clone() for out in outputs]
    by_graphs(encoder, torch.randn(2, 40, 16), record=record)
    assert all(map(torch.equal, outputs, kept))
    assert all(out.is_contiguous() for out in outputs)


def test_weights_may_change_in_place_and_in_any_other_way():
    encoder, record, x = make_encoder(conv_norm="batch"), Recorder(), torch.randn(2, 40, 16)
    check(encoder, x, record=record)
    layer = encoder.layers[0]
    with torch.no_grad():
        layer.ffn1.up.weight.mul_(1.5)
    layer.attention.pos.weight.data.mul_(1.5)
    layer.conv.depthwise_norm.running_mean.add_(0.3)
    check(encoder, x, record=record)
    assert record.recorded == 2
    for change in (
        lambda: setattr(layer.ffn1.up.weight, "data", torch.randn(24, 16)),
        lambda: setattr(layer.conv, "pointwise2", nn.Linear(16, 16)),
        lambda: encoder.load_state_dict(make_encoder(conv_norm="batch").state_dict(), assign=True),
    ):
        before = record.recorded
        change()
        check(encoder, x, record=record)
        assert record.recorded == before + 2


def test_dtypes_and_backends_have_graphs_of_their_own():
    encoder, record, x = make_encoder(), Recorder(), torch.randn(2, 40, 16)
    by_graphs(encoder, x, record=record)
    with backend("torch"):
        by_graphs(encoder, x, record=record)
    assert record.recorded == 4


def test_the_number_of_shapes_is_bounded():
    encoder, record = make_encoder(num_layers=1, position="none"), Recorder()
    for batch in range(1, graphs.SHAPES + 1):
        by_graphs(encoder, torch.randn(batch, 3, 16), depth=1, record=record)
    by_graphs(encoder, torch.randn(1, 3, 16), depth=1, record=record)
    assert record.recorded == graphs.SHAPES
    # one more: shape 2 has not been used for longest
    by_graphs(encoder, torch.randn(graphs.SHAPES + 1, 3, 16), depth=1, record=record)
    assert len(graphs._kept[encoder].shapes) == graphs.SHAPES
    by_graphs(encoder, torch.randn(1, 3, 16), depth=1, record=record)
    assert record.recorded == graphs.SHAPES + 1
    by_graphs(encoder, torch.randn(2, 3, 16), depth=1, record=record)
    assert record.recorded == graphs.SHAPES + 2


def test_inference_mode_and_no_grad_share_graphs():
    encoder, record, x = make_encoder(), Recorder(), torch.randn(2, 40, 16)
    with torch.inference_mode():
        by_graphs(encoder, x, record=record)
    check(encoder, x, record=record)
    assert record.recorded == 2


def test_ends_with_the_encoder():
    encoder = make_encoder()
    # a CUDA graph, unlike the stand-in, does not hold on to the function it recorded
    by_graphs(encoder, torch.randn(2, 40, 16), record=lambda call: call() or (lambda: None))
    watching, shape = weakref.ref(encoder), weakref.ref(next(iter(graphs._kept[encoder].shapes.values())))
    del encoder
    gc.collect()
    assert watching() is None
    assert shape() is None


def test_threads_take_turns():
    encoder, record = make_encoder(), Recorder()
    jobs = [torch.randn(2, frames, 16) for frames in (40, 50, 60, 70)]
    expected, wrong = [by_modules(encoder, x) for x in jobs], []

    def work(x, refs):
        for _ in range(5):
            outputs = by_graphs(encoder, x, record=record)
            wrong.extend(float(d) for d in map(lambda a, b: (a - b).abs().max(), outputs, refs) if d > 2e-5)

    threads = [threading.Thread(target=work, args=job) for job in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# on a GPU

GPU = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@torch.no_grad()
def on_gpu(encoder, x, lengths=None, **options):
    with engine("loop"):
        return encoder(x, lengths, **options)


def make_gpu(dtype=torch.float32, **changes):
    sizes = {"d_model": 64, "num_heads": 2, "ffn_dim": 128, "conv_kernel_size": 15}
    return make_encoder(**(sizes | changes)).cuda().to(dtype)


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ops", ["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gpu_equals_the_modules(options, ops, dtype):
    """By the rounding of the dtype: the products of a bucket may go by another kernel."""
    encoder, lengths = make_gpu(dtype, **options), torch.tensor([128, 65, 1], device="cuda")
    with backend(ops):
        for frames in (128, 100, 40):
            x, real = torch.randn(3, frames, 64, device="cuda", dtype=dtype), lengths.clamp(max=frames)
            refs, states = by_modules(encoder, x, real), on_gpu(encoder, x, real, return_hidden_states=True)[2][1:]
            mask = torch.arange(frames, device="cuda") < real[:, None]
            for k, (state, ref) in enumerate(zip(states, refs), 1):
                tolerance = 30 * torch.finfo(dtype).eps * float(ref[mask].abs().max())
                torch.testing.assert_close(state[mask], ref[mask], rtol=0, atol=tolerance)
                assert torch.equal(on_gpu(encoder, x, real, depth=k)[0][mask], state[mask])


@GPU
@pytest.mark.parametrize("ops", ["torch", "triton"])
def test_gpu_replays_are_bitwise_equal(ops):
    encoder, x = make_gpu(torch.bfloat16), torch.randn(4, 200, 64, device="cuda", dtype=torch.bfloat16)
    with backend(ops):
        first = on_gpu(encoder, x)[0]
        for _ in range(30):
            assert torch.equal(on_gpu(encoder, x)[0], first)


@GPU
def test_gpu_weights_may_change_between_calls():
    encoder, x = make_gpu(), torch.randn(2, 64, 64, device="cuda")
    on_gpu(encoder, x)
    for change in (
        lambda: encoder.layers[0].ffn1.up.weight.data.mul_(1.5),
        lambda: setattr(encoder.layers[0].norm.weight, "data", torch.randn(64, device="cuda")),
        lambda: encoder.cpu().cuda(),
    ):
        change()
        torch.testing.assert_close(on_gpu(encoder, x)[0], by_modules(encoder, x)[-1], rtol=0, atol=2e-5)


@GPU
def test_gpu_replays_do_not_synchronise():
    encoder, x, lengths = make_gpu(), torch.randn(2, 100, 64, device="cuda"), torch.tensor([100, 7], device="cuda")
    for _ in range(2):  # recorded the second time
        on_gpu(encoder, x, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu(encoder, x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_gpu_streams_take_turns():
    encoder, streams = make_gpu(), [torch.cuda.Stream() for _ in range(3)]
    jobs = [torch.randn(2, 100, 64, device="cuda") for _ in streams]
    expected, outputs = [by_modules(encoder, x)[-1] for x in jobs], []
    on_gpu(encoder, jobs[0])
    torch.cuda.synchronize()
    for stream, x in zip(streams * 5, jobs * 5):
        with torch.cuda.stream(stream):
            outputs.append(on_gpu(encoder, x)[0])
    torch.cuda.synchronize()
    for out, ref in zip(outputs, expected * 5):
        torch.testing.assert_close(out, ref, rtol=0, atol=2e-5)


@GPU
def test_gpu_becomes_part_of_a_graph_that_is_being_captured():
    encoder, x = make_gpu(), torch.randn(2, 64, 64, device="cuda")
    by_modules(encoder, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = encoder(x)[0]
        with pytest.raises(NotImplementedError, match="being captured"):
            on_gpu(encoder, x)
    graph.replay()
    torch.testing.assert_close(out, by_modules(encoder, x)[-1], rtol=0, atol=2e-5)
