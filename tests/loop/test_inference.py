"""The inference engine on the CPU: what the modules compute, in any batch, on any number of threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from lcconformer import Conformer, ConformerConfig, ConformerEncoder, backend, engine, extension, quantize
from lcconformer.loop import inference, weights
from lcconformer.ops.registry import record
from lcconformer.quantization import QuantizedLinear

from ..conftest import with_random_values

if (_reason := extension.why_missing()) is not None:
    pytest.skip(f"no compiled extension: {_reason}", allow_module_level=True)

CPU = extension.load().cpu
BASE = ConformerConfig(d_model=24, num_heads=2, ffn_dim=40, num_layers=3, conv_kernel_size=5, dropout=0.1)


def make_encoder(**changes) -> ConformerEncoder:
    """An encoder with nothing at its initial value."""
    encoder = ConformerEncoder(BASE.replace(**changes)).eval()
    with_random_values(encoder)
    return encoder


@torch.no_grad()
def reference(encoder: ConformerEncoder, x, lengths, dtype):
    """All hidden states by the modules in plain PyTorch."""
    with engine("modules"), backend("torch"):
        return copy.deepcopy(encoder).to(dtype)(x.to(dtype), lengths, return_hidden_states=True)[2]


@torch.no_grad()
def check(assert_close, encoder, x, lengths=None):
    with engine("loop"):
        out, _, states = encoder(x, lengths, return_hidden_states=True)
        assert torch.equal(encoder(x, lengths)[0], out)
    exact, low = (reference(encoder, x, lengths, dtype) for dtype in (torch.float64, x.dtype))
    assert len(states) == len(exact)
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    if lengths is not None:
        real = torch.arange(out.shape[1]) < lengths[:, None]
    for k, (state, e, near) in enumerate(zip(states, exact, low)):
        assert state.dtype == x.dtype
        assert_close(f"hidden state {k}", state[real], e[real], near[real], 2)


OPTIONS: dict[str, dict] = {
    "canon": {},
    "batch norm": {"conv_norm": "batch"},
    "group norm": {"conv_norm": "group", "conv_norm_groups": 3},
    "no norm": {"conv_norm": "none"},
    "statistics per depth": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    "convolution first": {"convolution_first": True},
    "no biases": {"attention_bias": False, "conv_bias": False},
    "no positions": {"position": "none"},
    "peer padding": {"padding": "peer"},
    "peer padding, batch norm": {"padding": "peer", "conv_norm": "batch"},
    "peer padding, group norm": {"padding": "peer", "conv_norm": "group"},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "two layers": {"sharing": "cycle:2"},
    "own layers": {"sharing": "none", "conv_norm": "group"},
    "front end": {"input_dim": 24},
    "wider": {"d_model": 80, "num_heads": 4, "ffn_dim": 300, "conv_kernel_size": 31, "layer_norm_eps": 1e-3},
    "layer norms per depth": {"conditioning": ("layer_norm",)},
    "step": {"conditioning": ("step",)},
    "film and lora": {"conditioning": ("film", "lora")},
}


@pytest.mark.parametrize(("changes", "layers"), [({}, 1), ({"sharing": "none"}, 3), ({"conditioning": ("lora",)}, 3)])
def test_arguments_are_made_once_for_each_layer(monkeypatch, changes, layers):
    """And launched again in every loop of the layer; for few frames, in every call."""
    made: dict[str, int] = {}

    def count(name: str):
        make = getattr(CPU, name)

        def counted(**args):
            made[name] = made.get(name, 0) + 1
            return make(**args)

        return counted

    encoder, few, many = make_encoder(**changes), torch.randn(1, 5, 24), torch.randn(2, 90, 24)
    with torch.no_grad(), engine("loop"):
        of_few, of_many = encoder(few)[0], encoder(many)[0]
        for name in ("RowsForward", "RelposAttentionForward", "GluDepthwiseConvForward"):
            monkeypatch.setattr(CPU, name, count(name))
        assert torch.equal(encoder(few)[0], of_few)
        assert not made
        assert torch.equal(encoder(many)[0], of_many)
    assert made == {"RowsForward": 3 * layers, "RelposAttentionForward": layers, "GluDepthwiseConvForward": layers}


def test_a_loop_is_one_call_into_cxx(monkeypatch):
    ran = []

    class Counted(CPU.Sequence):
        def run(self):
            ran.append(self)
            super().run()

    encoder, x = make_encoder(), torch.randn(2, 90, 24)
    with torch.no_grad(), engine("loop"):
        out = encoder(x)[0]
        monkeypatch.setattr(CPU, "Sequence", Counted)
        assert torch.equal(encoder(x)[0], out)
    assert len(ran) == 3
    assert len(set(map(id, ran))) == 1


def test_a_call_of_few_frames_makes_no_tensor_but_its_output():
    encoder, x = make_encoder(), torch.randn(1, 16, 24)

    class Made(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), engine("loop"):
        out = encoder(x)[0]
        with Made() as made:
            again = encoder(x)[0]
    assert torch.equal(again, out)
    assert made.names == ["empty_like"]


def test_kept_buffers_serve_every_call_that_they_fit():
    """Other values, lengths, shapes and modes in turn, and after an update; each as on buffers of its own."""
    encoder = make_encoder(conv_norm="group", conditioning=("step",))
    calls = []
    for t in (5, 9, 5, 16, 3, 4, 2, 9):
        x = torch.randn(2, t, 24)
        calls += [(x, None), (x, torch.tensor([t, t // 2])), (x + 1, torch.tensor([1, t], dtype=torch.int32))]

    def run(x, lengths, fresh):
        if fresh:
            encoder.forget_packed_weights()
        return encoder(x, lengths)[0]

    with engine("loop"):
        for updated in (False, True):
            for i, (x, lengths) in enumerate(calls):
                with torch.inference_mode(i % 2 == 0), torch.no_grad():
                    kept = run(x, lengths, False)
                    before = kept.clone()
                    again = run(x * 2, lengths, False)
                    assert torch.equal(kept, before), "a result was written again"
                with torch.no_grad():
                    assert torch.equal(kept, run(x, lengths, True))
                    assert torch.equal(again, run(x * 2, lengths, True))
                    run(x, lengths, False)
            if not updated:
                with torch.no_grad():
                    encoder.layers[0].norm.bias += 1.0


def test_callers_at_once_have_buffers_of_their_own():
    encoder = make_encoder()
    inputs = [torch.randn(1, 16, 24) for _ in range(8)]

    def call(i: int) -> bool:
        with torch.no_grad(), engine("loop"):
            return torch.equal(encoder(inputs[i % 8])[0], expected[i % 8])

    with torch.no_grad(), engine("loop"):
        expected = [encoder(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(400)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, torch.tensor([37, 1, 20])], ids=["whole", "lengths"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_oracle(assert_close, options, lengths):
    encoder = make_encoder(**options)
    check(assert_close, encoder, torch.randn(3, 37, options.get("d_model", 24)), lengths)


@pytest.fixture(params=["products of float32", "products of bfloat16"])
def products(request, monkeypatch):
    """Those of a bfloat16 encoder, both on every processor: the kernels stand in for instructions that it lacks."""
    dtype = torch.bfloat16 if request.param.endswith("bfloat16") else torch.float32
    monkeypatch.setattr(weights, "product_dtype", lambda like: dtype if like.dtype == torch.bfloat16 else torch.float32)
    return dtype


@pytest.mark.usefixtures("products", "poisoned")
@pytest.mark.parametrize(
    "options", ["canon", "gelu", "group norm", "film and lora", "convolution first", "peer padding, group norm"]
)
def test_bfloat16(assert_close, options):
    encoder = make_encoder(**OPTIONS[options]).bfloat16()
    check(assert_close, encoder, torch.randn(2, 33, 24).bfloat16(), torch.tensor([33, 12]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 193), (5, 63), (1, 2000)])
def test_sizes(assert_close, shape):
    check(assert_close, make_encoder(), torch.randn(*shape, 24))


@pytest.mark.parametrize("level", CPU.simd_levels())
def test_simd_levels(assert_close, level):
    encoder, x, before = make_encoder(), torch.randn(2, 33, 24), CPU.simd_level()
    with engine("loop"), torch.no_grad():
        encoder(x)  # packed positions are those of a level
    CPU.set_simd_level(level)
    try:
        check(assert_close, encoder, x, torch.tensor([33, 30]))
    finally:
        CPU.set_simd_level(before)


@torch.no_grad()
def test_the_base_model(assert_close):
    encoder = make_encoder(d_model=256, num_heads=4, ffn_dim=1024, conv_kernel_size=31, num_layers=2)
    check(assert_close, encoder, torch.randn(2, 100, 256), torch.tensor([100, 77]))


@pytest.mark.parametrize("norm", ["layer", "batch", "group", "none"])
@torch.no_grad()
def test_a_batch_gives_what_each_utterance_gets_alone(norm):
    """Bit for bit, but for statistics over frames: no product looks at another row, and padding may hold anything."""
    encoder, lengths = make_encoder(conv_norm=norm), torch.tensor([203, 1, 64, 97])
    x = torch.randn(4, 203, 24)
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = torch.nan
    with engine("loop"):
        out, _ = encoder(x, lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = encoder(x[i : i + 1, :n])[0][0]
            torch.testing.assert_close(out[i, :n], alone, rtol=0, atol=1e-5 if norm == "group" else 0)


@torch.no_grad()
def test_same_bits_on_any_number_of_threads():
    encoder, x = make_encoder(conv_norm="group"), torch.randn(2, 203, 24)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with engine("loop"):
                outputs.append(encoder(x, torch.tensor([203, 120]))[0])
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])


@torch.no_grad()
def test_any_depth_is_a_prefix():
    encoder, x = make_encoder(sharing="cycle:2"), torch.randn(2, 11, 24)
    with engine("loop"):
        states = encoder(x, return_hidden_states=True)[2]
        for depth in (1, 2, 3):
            assert torch.equal(encoder(x, depth=depth)[0], states[depth])


@torch.no_grad()
def test_results_are_not_written_again():
    encoder, x = make_encoder(), torch.randn(2, 11, 24)
    given = x.clone()
    with engine("loop"):
        first = encoder(x, return_hidden_states=True)[2]
        kept = [state.clone() for state in first]
        encoder(torch.randn(2, 11, 24), return_hidden_states=True)
    assert torch.equal(x, given)
    assert all(map(torch.equal, first, kept))


@torch.no_grad()
def test_inputs_of_any_layout():
    encoder, x = make_encoder(), torch.randn(11, 2, 48)[..., ::2].transpose(0, 1)
    lengths = torch.tensor([11, 0, 6])[::2]
    with engine("loop"):
        out = encoder(x.contiguous(), lengths.contiguous())[0]
        assert torch.equal(encoder(x, lengths)[0], out)
        assert torch.equal(encoder(x, lengths.int())[0], out)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@torch.no_grad()
def test_empty(shape):
    with engine("loop"):
        out, _, states = make_encoder()(torch.randn(*shape, 24), return_hidden_states=True)
    assert out.shape == (*shape, 24)
    assert len(states) == 4


@torch.no_grad()
def test_an_utterance_without_frames():
    encoder, x = make_encoder(), torch.randn(2, 9, 24)
    with engine("loop"):
        out = encoder(x, torch.tensor([9, 0]))[0]
        assert torch.equal(out[:1], encoder(x[:1])[0])


@torch.no_grad()
def test_defaults_of_the_process_do_not_matter():
    encoder, x = make_encoder(), torch.randn(1, 9, 24)
    with engine("loop"):
        out = encoder(x)[0]
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                assert torch.equal(copy.deepcopy(encoder)(x)[0], out)
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_torchaudio_signature(assert_close):
    conformer = Conformer(24, 2, 40, 2, 5, dropout=0.1).eval()
    x, lengths = torch.randn(2, 30, 24), torch.tensor([30, 11])
    with engine("loop"):
        out, _ = conformer(x, lengths)
    with engine("modules"), backend("torch"):
        torch.testing.assert_close(out[0], conformer(x, lengths)[0][0], rtol=0, atol=1e-5)


# when it serves, and when not


def runs_the_engine(encoder: ConformerEncoder, x: torch.Tensor) -> bool:
    """Whether the library, left to choose, runs the encoder on the engine."""
    with record() as served, torch.no_grad():
        encoder(x)
    return "shared_loop" in served


def test_serves_by_default():
    assert runs_the_engine(make_encoder(), torch.randn(2, 9, 24))
    with engine("modules"):
        assert not runs_the_engine(make_encoder(), torch.randn(2, 9, 24))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_own_forward(encoder):
    encoder.layers[0].ffn1.forward = lambda x: x


def with_parametrization(encoder):
    nn.utils.parametrizations.weight_norm(encoder.layers[0].ffn1.up)


REFUSED = {
    "hook": (lambda e: e.layers[0].ffn1.up.register_forward_hook(lambda *_: None), "layers.0.ffn1.up has hooks"),
    "pre-hook": (lambda e: e.layers[0].register_forward_pre_hook(lambda *_: None), "layers.0 has hooks"),
    "subclass": (lambda e: setattr(e.layers[0].attention, "out", Scaled(24, 24)), "layers.0.attention.out is a Scaled"),
    "own forward": (with_own_forward, "layers.0.ffn1 has a forward of its own"),
    "parametrized": (with_parametrization, "layers.0.ffn1.up is a Parametrized"),
    "pruned": (lambda e: prune.random_unstructured(e.layers[0].conv.pointwise1, "weight", 0.5), "pointwise1 has hooks"),
    "epsilon": (lambda e: setattr(e.layers[0].norm, "eps", 0.1), "an epsilon other than"),
    "mixed dtypes": (lambda e: e.layers[0].ffn1.up.double(), "a weight is not"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_an_encoder_it_does_not_know(change, reason):
    encoder, x = make_encoder(), torch.randn(1, 9, 24)
    assert runs_the_engine(encoder, x)
    change(encoder)
    with engine("loop"), torch.no_grad(), pytest.raises(NotImplementedError, match=reason):
        encoder(x)
    if reason != "a weight is not":  # which the modules refuse too
        assert not runs_the_engine(encoder, x)


@pytest.mark.parametrize("part", ["", "layers.0.attention"])
def test_what_drops_is_left_to_the_training_engine(part):
    encoder, x = make_encoder(dropout=0.1), torch.randn(1, 9, 24)
    encoder.get_submodule(part).train()
    with torch.no_grad():
        assert encoder.explain(x).engine == "training"
        assert not runs_the_engine(encoder, x)


def test_refuses_under_hooks_on_every_module():
    encoder, x = make_encoder(), torch.randn(1, 9, 24)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with engine("loop"), torch.no_grad(), pytest.raises(NotImplementedError, match="global module hooks"):
            encoder(x)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"position": "rotary"}, "rotary")],
)
def test_refuses_what_it_has_no_kernel_for(changes, reason):
    encoder, x = make_encoder(**changes), torch.randn(1, 9, 24)
    assert not runs_the_engine(encoder, x)
    with engine("loop"), torch.no_grad(), pytest.raises(NotImplementedError, match=reason):
        encoder(x)


def test_refuses_other_backends_and_dtypes():
    encoder, x = make_encoder(), torch.randn(1, 9, 24)
    with engine("loop"), torch.no_grad():
        with backend("torch"), pytest.raises(NotImplementedError, match="backend 'torch' is forced"):
            encoder(x)
        with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast is on"):
            encoder(x)
        with pytest.raises(NotImplementedError, match=r"float64 is not one of"):
            encoder.double()(x.double())


def test_bfloat16_is_left_to_the_modules_where_they_are_faster(monkeypatch):
    """By processor and products: test_choice.py."""
    encoder = make_encoder().bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not runs_the_engine(encoder, torch.randn(1, 400, 24).bfloat16())
    assert runs_the_engine(encoder, torch.randn(1, 40, 24).bfloat16())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert runs_the_engine(encoder, torch.randn(1, 400, 24).bfloat16())


def test_products_are_in_bfloat16_where_the_processor_is_faster_at_them(monkeypatch):
    for level, gain, width, dtype, products in (
        ("avx512bf16", 2.0, 24, torch.bfloat16, torch.bfloat16),
        ("avx512bf16", 0.5, 24, torch.bfloat16, torch.float32),
        ("avx512bf16", 2.0, 24, torch.float32, torch.float32),
        ("avx512bf16", 2.0, 23, torch.bfloat16, torch.float32),  # it multiplies by pairs
        ("avx512", 0.5, 24, torch.bfloat16, torch.float32),
    ):
        monkeypatch.setattr(CPU, "simd_level", lambda level=level: level)
        monkeypatch.setattr(CPU, "bfloat16_gain", lambda gain=gain: gain)
        assert weights.product_dtype(torch.empty(3, width, dtype=dtype)) == products


def test_the_gain_of_bfloat16_is_measured():
    gain = CPU.bfloat16_gain()
    assert 0.01 < gain < 10
    assert CPU.bfloat16_gain() == gain  # once
    if CPU.simd_level() != "avx512bf16":
        assert gain < 1  # the kernels take such products apart


@pytest.mark.parametrize(
    ("level", "gain", "against"),
    [
        ("avx512bf16", 2.0, None),
        ("avx512bf16", 0.48, "this processor's products of bfloat16 are 0.48 times as fast as of float32"),
        ("avx512", 0.4, "this processor has no AVX512-BF16"),
    ],
)
@torch.no_grad()
def test_explains_which_products_it_takes(level, gain, against, monkeypatch):
    encoder, x = make_encoder().bfloat16(), torch.randn(1, 9, 24).bfloat16()
    monkeypatch.setattr(CPU, "simd_level", lambda: level)
    monkeypatch.setattr(CPU, "bfloat16_gain", lambda: gain)
    said = str(encoder.explain(x))
    assert "inference engine" in said
    assert ("not cpu with products of bfloat16" in said) == (against is not None)
    if against is not None:
        assert f"not cpu with products of bfloat16: {against}; they are in float32" in said


def test_gradients_come_from_elsewhere():
    encoder, x = make_encoder(dropout=0.0), torch.randn(1, 9, 24, requires_grad=True)
    encoder(x)[0].sum().backward()
    assert x.grad is not None
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    x.grad = None
    encoder(x)[0].square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert not encoder(x.detach())[0].requires_grad


class _Large(TorchDispatchMode):
    """Operators of PyTorch that compute as many elements as it takes for its threads to join in."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() > 1 << 15:
            self.names.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_of_openmp_sleep_on(dtype):
    """They would spin for milliseconds on the cores of the kernels' own threads."""
    encoder = make_encoder().to(dtype)
    x = torch.randn(4, 400, 24).to(dtype)
    with torch.no_grad(), engine("loop"):
        expected = encoder(x)[0]
        with _Large() as large:
            found = encoder(x)[0]
    assert torch.equal(found, expected)
    assert large.names
    assert large.names <= {"empty", "empty_like", "view", "slice", "unflatten", "detach", "alias"}


@torch.no_grad()
def test_longer_calls_leave_their_buffers_to_the_next(monkeypatch):
    encoder, inputs = make_encoder(), [torch.randn(1, frames, 24) for frames in (300, 300, 200, 301, 250)]
    with engine("loop"):
        expected = [copy.deepcopy(encoder)(x)[0] for x in inputs]
        outputs, memory = [], []
        for x in inputs:
            outputs.append(encoder(x)[0])
            memory += [m.data_ptr() for m in weights.packed(encoder, 1, 1)[0].memory]
        for out, e in zip(outputs, expected):
            assert torch.equal(out, e)
        assert len(memory) == len(inputs)
        assert memory[0] == memory[1] == memory[2]
        assert memory[3] == memory[4]
        monkeypatch.setattr(inference, "_KEPT_BYTES", 1000)
        encoder(inputs[0])
        assert weights.packed(encoder, 1, 1)[0].memory == []


def test_calls_at_once_have_their_own_buffers():
    encoder, inputs = make_encoder(), [torch.randn(1, 290 + i, 24) for i in range(8)]

    def run(x):
        with torch.inference_mode(), engine("loop"):
            return encoder(x)[0]

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for out, e in zip(pool.map(run, inputs), expected):
                assert torch.equal(out, e)


# --- weights in 8 bits -----------------------------------------------------------------------------------------------


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., n]`` in steps of 1/127 of their largest magnitude."""
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (x * (127 / most)).round() * (most / 127)


def rounding(encoder: ConformerEncoder) -> ConformerEncoder:
    """A copy in float64 whose matrices round their inputs as the kernels do; its modules are to run it."""
    encoder = copy.deepcopy(encoder).double()
    for name, module in encoder.named_modules():
        if isinstance(module, QuantizedLinear):
            group = CPU.HIDDEN_COLUMNS if name.endswith(".down") else module.in_features
            module.register_forward_pre_hook(
                lambda _, args, group=group: (torch.cat([rounded(part) for part in args[0].split(group, -1)], -1),)
            )
    return encoder


@pytest.fixture
def in_int8(monkeypatch):
    """On every processor: the kernels stand in for instructions that it lacks."""
    monkeypatch.setattr("lcconformer.loop.weights.multiplies_int8", lambda: True)


@pytest.mark.usefixtures("in_int8", "products", "poisoned")
@pytest.mark.parametrize("lengths", [None, torch.tensor([37, 1, 20])], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["canon", "batch norm", "no biases", "no positions", "two layers", "wider", "step"])
def test_int8(options, dtype, lengths):
    """Nearer to the modules with rounded inputs than those are to the encoder with float weights, at every depth."""
    near = 0.5 if dtype == torch.float32 else 1.0
    whole = make_encoder(**OPTIONS[options]).to(dtype)
    encoder = quantize(whole)
    x = torch.randn(3, 37, encoder.config.d_model, dtype=dtype)
    with torch.no_grad(), engine("loop"), record() as choices:
        out, _, states = encoder(x, lengths, return_hidden_states=True)
        assert torch.equal(encoder(x, lengths)[0], out)
    assert choices == {"shared_loop": "cpu"}
    real = torch.ones(x.shape[:2], dtype=torch.bool) if lengths is None else torch.arange(37) < lengths[:, None]
    exact = reference(whole, x, lengths, torch.float64)[1:]
    for state, rounds, e in zip(states[1:], reference(rounding(encoder), x, lengths, torch.float64)[1:], exact):
        state, rounds, e = state[real].double(), rounds[real], e[real]
        assert (rounds - e).norm() < 0.06 * e.norm()
        assert (state - rounds).norm() < near * (rounds - e).norm()
        assert (state - e).norm() < 2 * (rounds - e).norm()


@pytest.mark.usefixtures("in_int8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_int8_has_attention_as_the_encoder_had_it(gain, dtype, monkeypatch):
    monkeypatch.setattr(CPU, "simd_level", lambda: "avx512bf16")
    monkeypatch.setattr(CPU, "bfloat16_gain", lambda: gain)
    encoder = make_encoder().to(dtype)
    for packed in (encoder, quantize(encoder)):
        assert weights.pack(packed.layers[0], {}).dtype == (dtype if gain > 1 else torch.float32)


@pytest.mark.usefixtures("in_int8")
def test_int8_of_a_batch_gives_what_each_utterance_gets_alone():
    encoder = quantize(make_encoder(ffn_dim=300))
    lengths = torch.tensor([37, 1, 20, 36])
    x = torch.randn(4, 37, 24)
    with torch.no_grad(), engine("loop"):
        whole = encoder(x, lengths)[0]
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(encoder(x[b : b + 1, :n])[0][0], whole[b, :n])


@pytest.mark.usefixtures("in_int8")
@pytest.mark.parametrize("leaf", ["weight", "scale", "bias"])
def test_int8_sees_what_is_written(leaf):
    encoder, x = quantize(make_encoder()), torch.randn(1, 30, 24)
    with torch.no_grad(), engine("loop"):
        before = encoder(x)[0]
        tensor = getattr(encoder.layers[0].ffn1.up, leaf)
        tensor.mul_(2) if leaf != "weight" else tensor.bitwise_not_()
        assert not torch.equal(encoder(x)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_are_widened_where_the_processor_does_not_multiply_them(assert_close, dtype, monkeypatch):
    monkeypatch.setattr("lcconformer.loop.weights.multiplies_int8", lambda: False)
    encoder, x = quantize(make_encoder()).to(dtype), torch.randn(2, 37, 24, dtype=dtype)
    check(assert_close, encoder, x, torch.tensor([37, 20]))
    with torch.no_grad():
        said = str(encoder.explain(x))
    assert "not cpu with products of int8: this processor has no AVX512-VNNI" in said
    monkeypatch.setattr("lcconformer.loop.weights.multiplies_int8", lambda: True)
    with torch.no_grad():
        assert "not cpu" not in str(encoder.explain(x))


@pytest.mark.usefixtures("in_int8")
@torch.no_grad()
def test_int8_streams():
    """Chunk by chunk as near to modules with rounded inputs as whole utterances; a stream has the same bits beside others."""
    whole = make_encoder(num_layers=2, input_dim=24)
    encoder = quantize(whole)
    x = torch.randn(3, 24, 24)

    def stream(x):
        streaming, parts = encoder.streaming(chunk=8, left=16, right=0), []
        state = streaming.start(len(x))
        for part in x.split(8, 1):
            with record() as choices:
                out, _, state = streaming(part, torch.full((len(x),), 8), state)
            assert choices == {"shared_loop": "cpu"}
            parts.append(out)
        return torch.cat(parts, 1)

    def at_once(encoder):
        with engine("modules"), backend("torch"):
            return encoder.double().streaming(chunk=8, left=16, right=0).whole(x.double())[0]

    streamed, rounds, exact = stream(x), at_once(rounding(encoder)), at_once(copy.deepcopy(whole))
    assert (rounds - exact).norm() < 0.06 * exact.norm()
    assert (streamed.double() - rounds).norm() < 0.5 * (rounds - exact).norm()
    for one, expected in zip(x, streamed):
        assert torch.equal(stream(one[None])[0], expected)
