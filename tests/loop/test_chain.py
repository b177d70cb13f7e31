"""The chain of Triton kernels against the modules in float64, in Triton's interpreter; and on a GPU."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from lcconformer.kernels import chain_convolution, chain_products, common, relpos_attention

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine
from lcconformer.loop import chain, graphs
from lcconformer.loop.recording import unrecorded

from ..conftest import with_random_values

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="kernels are compiled here: test_graphs.py runs them")

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.1)


def make_encoder(**changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).eval()
    with_random_values(encoder)
    return encoder


@torch.no_grad()
def by_modules(encoder, x, lengths, depth):
    with engine("modules"), backend("torch"):
        return encoder(x, lengths, depth=depth, return_hidden_states=True)[2][1:]


@torch.no_grad()
def by_chain(encoder, x, lengths=None, depth=2, all_states=True):
    with backend("triton"):
        assert chain.reasons(encoder, x, x.shape[0] * x.shape[1]) == []
        made = chain.Chain(encoder, x, lengths, unrecorded)
        return [state.clone() for state in made.run(encoder, depth, all_states)]


def check(assert_close, encoder, x, lengths=None, depth=2):
    refs = by_modules(copy.deepcopy(encoder).double(), x.double(), lengths, depth)
    lows = by_modules(encoder, x, lengths, depth)
    outs = by_chain(encoder, x, lengths, depth)
    assert len(outs) == depth
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(x.shape[1]) < lengths[:, None]
    for k, (out, ref, low) in enumerate(zip(outs, refs, lows)):
        assert_close(f"loop {k}", out[real], ref[real], low[real], 2.0)


OPTIONS = [
    {},
    {"position": "none", "convolution_first": True},
    {"sharing": "cycle:2", "padding": "peer"},
    {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    {"conv_norm": "batch", "conv_bias": False},
    {"conv_norm": "none", "attention_bias": False, "conv_bias": False, "padding": "peer"},
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 3])], ids=["whole", "lengths"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_modules(options, lengths, assert_close):
    check(assert_close, make_encoder(**options), torch.randn(2, 7, 16), lengths)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("frames", [1, 65, pytest.param(203, marks=pytest.mark.slow)])
def test_odd_lengths(frames, assert_close):
    check(assert_close, make_encoder(), torch.randn(1, frames, 16), torch.tensor([frames - frames // 3]), depth=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("d_model", "heads"), [(144, 4), pytest.param(320, 5, marks=pytest.mark.slow)])
def test_widths_that_are_no_power_of_two(d_model, heads, assert_close):
    encoder = make_encoder(d_model=d_model, num_heads=heads, ffn_dim=40)
    check(assert_close, encoder, torch.randn(1, 5, d_model))


@pytest.mark.usefixtures("poisoned")
def test_float16(assert_close):
    check(assert_close, make_encoder().half(), torch.randn(2, 7, 16).half(), torch.tensor([7, 3]))


def test_many_rows(monkeypatch, assert_close):
    """Several tiles of columns a program, several frames a register row."""
    monkeypatch.setattr(chain_products, "FEW", 3)
    monkeypatch.setattr(chain_products, "_PROGRAMS", 1)
    monkeypatch.setattr(chain_convolution, "FEW_FRAMES", 3)
    check(assert_close, make_encoder(ffn_dim=40).half(), torch.randn(1, 9, 16).half())


def test_the_same_bits_every_time():
    encoder, x, lengths = make_encoder(), torch.randn(2, 7, 16), torch.tensor([7, 3])
    first = by_chain(encoder, x, lengths)
    assert all(map(torch.equal, first, by_chain(encoder, x, lengths)))
    (last,) = by_chain(encoder, x, lengths, all_states=False)
    assert torch.equal(last, first[-1])


def test_one_chain_serves_every_depth_and_weights_written_in_place(assert_close):
    encoder, x = make_encoder(conv_norm="batch"), torch.randn(1, 5, 16)
    with torch.no_grad(), backend("triton"):
        made = chain.Chain(encoder, x, None, unrecorded)
        for depth in (3, 1):
            (out,) = made.run(encoder, depth, False)
            torch.testing.assert_close(out, by_modules(encoder, x, None, depth)[-1], rtol=0, atol=2e-5)
        layer = encoder.layers[0]
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data.mul_(2)
        (out,) = made.run(encoder, 1, False)
        torch.testing.assert_close(out, by_modules(encoder, x, None, 1)[-1], rtol=0, atol=2e-5)


def test_launches_are_bound_once_for_all_loops_and_calls(monkeypatch):
    bound = []

    def bind(kernel, *_):
        bound.append(kernel.__name__)
        return lambda _stream, _hooked: None

    def count(depth, all_states):
        bound.clear()
        list(made.run(encoder, depth, all_states))
        return len(bound)

    monkeypatch.setattr(common, "_bind", bind)
    encoder = make_encoder(num_layers=4)
    with torch.no_grad(), backend("triton"):
        made = chain.Chain(encoder, torch.randn(1, 5, 16), None, unrecorded)
        # the taps; the first loop; of the others what comes from the loop before, once; the last norm
        assert count(3, False) == 1 + 10 + 2 + 1
        assert count(3, False) == 0
        assert count(4, False) == 1 + 10 + 2 + 1
        assert count(4, True) == 1 + 10 + 3 * 2 + 1
        assert count(4, True) == count(3, False) == 0


def test_what_changes_between_calls_is_seen():
    """Bound launches are kept while the weights stay where they are, and no longer."""
    encoder, x = make_encoder(padding="peer", conv_norm="batch"), torch.randn(1, 5, 16)
    layer = encoder.layers[0]

    def call(x, lengths=None, depth=1):
        (out,) = graphs.run(encoder, x, lengths, depth, False, unrecorded)
        low = by_modules(encoder, x, lengths, depth)[-1]
        real = slice(None) if lengths is None else torch.arange(x.shape[1]) < lengths[:, None]
        torch.testing.assert_close(out[real], low[real], rtol=0, atol=2e-5)
        return next(reversed(graphs._kept[encoder].shapes.values())).loops

    def in_place():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data.mul_(2)

    with torch.no_grad(), backend("triton"):
        kept = call(x)
        assert call(torch.randn(1, 5, 16), depth=2) is kept
        in_place()
        assert call(x) is kept
        encoder.load_state_dict(make_encoder(padding="peer", conv_norm="batch").state_dict())
        assert call(x) is kept
        assert call(torch.randn(2, 3, 16)) is not kept
        assert call(x, torch.tensor([3])) is not kept
        for change in (
            lambda: setattr(layer.ffn1.up.weight, "data", torch.randn(24, 16)),
            lambda: setattr(layer.conv, "pointwise2", torch.nn.Linear(16, 16)),
            lambda: encoder.load_state_dict(encoder.double().float().state_dict(), assign=True),
        ):
            kept = call(x)
            change()
            assert call(x) is not kept


def test_threads_take_turns():
    encoder, wrong = make_encoder(padding="peer"), []
    jobs = [torch.randn(1, 5, 16) for _ in range(3)]
    expected = [by_modules(encoder, x, None, 1)[-1] for x in jobs]

    def work(x, ref):
        with backend("triton"):
            for _ in range(3):
                (out,) = graphs.run(encoder, x, None, 1, False, unrecorded)
                if not torch.allclose(out, ref, rtol=0, atol=2e-5):
                    wrong.append(out)

    threads = [threading.Thread(target=work, args=job) for job in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(graphs._kept[encoder].shapes) == 1


class Operators(TorchDispatchMode):
    """Collects the names of ATen operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launches(monkeypatch, encoder, x, depth):
    """Names of the kernels and whether they start early, and of the operators of PyTorch that compute something."""
    found = []

    def record(kernel, grid, config, *_args, **_kwargs):
        common.issue(lambda _stream, _hooked: found.append((kernel.__name__, config.pdl)), x)

    for module in (chain_products, chain_convolution, relpos_attention):
        monkeypatch.setattr(module, "launch", record)
    for module in (chain_products, chain_convolution):
        monkeypatch.setattr(module, "supports_pdl", lambda x: True)
    with torch.no_grad(), backend("triton"):
        made = chain.Chain(encoder, x, None, unrecorded)
        with Operators() as seen:
            list(made.run(encoder, depth, False))
    free = {"view", "_unsafe_view", "unbind", "unsqueeze", "select", "slice", "new_empty", "t", "alias", "detach"}
    return found, [name for name in seen.names if name not in free]


def test_ten_kernels_a_layer(monkeypatch):
    encoder, x = make_encoder(), torch.randn(1, 5, 16)
    found, operators = launches(monkeypatch, encoder, x, 1)
    assert operators == ["mm"]  # the positions
    more, operators = launches(monkeypatch, encoder, x, 3)
    assert operators == ["mm"]
    assert len(more) - len(found) == 2 * 10
    assert more[0] == ("_taps_kernel", False)
    # before the first kernel, which waits for all that came before, everything is done that others read ahead
    up, down, attention, depthwise = (
        f"_{name}" for name in ("norm_product_kernel", "residual_product_kernel", "forward", "depthwise_kernel")
    )
    layer = [(up, True), (down, True), (up, True), (attention, False), (down, True)]
    layer += [(up, True), (depthwise, True), (down, True), (up, True), (down, True)]
    assert more[1:] == [(up, False), *layer[1:], *layer, *layer, ("_norm_kernel", True)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position": "rotary"}, "rotary positions"),
        ({"conv_norm": "group"}, "conv_norm='group'"),
        ({"activation": "gelu"}, "activation 'gelu' is not fused"),
        ({"conditioning": ("step",)}, "conditioning is left"),
        ({"d_model": 512, "num_heads": 2}, r"heads are fused up to D = 128, got D = 256"),
        ({"d_model": 1024, "num_heads": 16}, "5 rows are fused up to d_model = 768 on this GPU, got 1024"),
    ],
    ids=str,
)
def test_what_it_does_not_serve(changes, reason):
    encoder = make_encoder(**changes)
    x = torch.randn(1, 5, encoder.config.d_model)
    with backend("triton"):
        assert [r for r in chain.reasons(encoder, x, 5) if reason in r]
    for name in ("auto", "cpu"):
        with backend(name):
            assert chain.reasons(make_encoder(), torch.randn(1, 5, 16), 5)


def test_weights_that_are_not_contiguous_are_left_to_the_modules():
    encoder, x = make_encoder(), torch.randn(1, 5, 16)
    with backend("triton"):
        assert chain.reasons(encoder, x, 5) == []
        encoder.layers[0].norm.bias.data = torch.randn(16, 2)[:, 0]
        assert chain.reasons(encoder, x, 5) == ["weights that are not contiguous are left to the modules"]


def test_many_wide_or_float32_rows_are_left_to_the_library(monkeypatch):
    def reasons(d: int, rows: int, dtype: torch.dtype = torch.float16) -> str:
        encoder = make_encoder(d_model=d, num_heads=d // 64 or 1)
        with backend("triton"):
            return "; ".join(chain.reasons(encoder, torch.empty(1, 1, d, dtype=dtype), rows))

    for d, most in ((16, 2048), (256, 2048), (320, 256), (512, 256), (576, 64)):
        assert reasons(d, most) == ""
        assert f"predicted to be faster beyond {most} at this width" in reasons(d, most + 1)
    assert "513 rows are fused up to d_model = 512" in reasons(576, 513)
    assert reasons(16, 512, torch.float32) == ""
    assert "512 float32 rows" in reasons(16, 513, torch.float32)
    # a smaller GPU has less shared memory
    monkeypatch.setattr(common, "arch_of", lambda x: 89)
    assert reasons(576, 64) == ""
    assert "up to d_model = 256" in reasons(576, 513)


def test_runs_where_triton_is_forced_and_is_told(monkeypatch):
    """As on a GPU: graphs.run takes the chain, whose recording stands for all loops of a depth."""
    from lcconformer.ops.registry import record

    from .test_graphs import Recorder

    encoder, x, recorder = make_encoder(padding="peer"), torch.randn(1, 5, 16), Recorder()
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: recorder)
    lows = by_modules(encoder, x, None, 3)
    with backend("triton"), record() as served:
        for recorded in (0, 1, 1):  # the first time as it is, then recorded, then replayed
            outs = graphs.run(encoder, x, None, 2, True)
            assert recorder.recorded == recorded
            for out, low in zip(outs, lows):
                torch.testing.assert_close(out, low, rtol=0, atol=2e-5)
        graphs.run(encoder, x, None, 3, False)
        assert recorder.recorded == 2
        assert "relpos_attention" not in served
        assert served == {"shared_loop": "triton"}
