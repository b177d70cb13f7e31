"""Packed weights: never stale, never saved, never copied, packed once."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lcconformer import ConformerConfig, ConformerEncoder, engine, extension
from lcconformer.loop import weights

if (_reason := extension.why_missing()) is not None:
    pytest.skip(f"no compiled extension: {_reason}", allow_module_level=True)

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.1)


def make_encoder(**changes) -> ConformerEncoder:
    encoder = ConformerEncoder(BASE.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def by(name: str, encoder: ConformerEncoder, frames: int = 9) -> torch.Tensor:
    x = torch.linspace(-2, 2, 2 * frames * 16).sin().view(2, frames, 16)
    with engine(name), torch.no_grad():
        return encoder(x)[0]


def check(encoder: ConformerEncoder) -> torch.Tensor:
    """The engine gives what the modules give."""
    out = by("loop", encoder)
    torch.testing.assert_close(out, by("modules", encoder), rtol=0, atol=2e-5)
    return out


# every way to change a weight


def by_optimizer(kind: Callable, **options) -> Callable[[ConformerEncoder], None]:
    def change(encoder):
        optimizer = kind(encoder.parameters(), lr=0.05, **options)
        encoder(torch.randn(1, 5, 16))[0].square().sum().backward()
        optimizer.step()

    return change


def by_gradient_free_write(encoder):
    with torch.no_grad():
        encoder.layers[0].norm.bias += 0.5


def by_state_dict(encoder, assign=False):
    encoder.load_state_dict(make_encoder().state_dict(), assign=assign)


def by_losing_precision(encoder):
    encoder.half().float()


def by_assignment(encoder):
    encoder.layers[0].conv.pointwise1.weight = nn.Parameter(torch.randn(32, 16))


def by_assignment_in_the_same_memory(encoder):
    out = encoder.layers[0].attention.out
    out.weight = nn.Parameter(out.weight.data.t())


def by_new_module(encoder):
    encoder.layers[0].ffn2.down = nn.Linear(24, 16)


def by_tying(encoder):
    layer = encoder.layers[0]
    layer.ffn2.up.weight = layer.ffn1.up.weight
    check(encoder)
    with torch.no_grad():
        layer.ffn1.up.weight *= 1.5


def by_vector(encoder):
    vector_to_parameters(parameters_to_vector(encoder.parameters()) * 1.1, encoder.parameters())


def by_data(encoder):
    encoder.layers[0].conv.depthwise.weight.data = torch.randn(16, 1, 5)


def by_data_there_and_back(encoder):
    """The allocator may hand out the first memory again."""
    weight = encoder.layers[0].ffn1.up.weight
    for _ in range(4):
        weight.data = torch.randn(24, 16)


def by_transposed_data(encoder):
    weight = encoder.layers[0].attention.out.weight
    weight.data = weight.data.t()


def by_writing_data(encoder):
    encoder.layers[0].attention.pos.weight.data.mul_(1.5)


def by_averaging_data(encoder):
    other = make_encoder()
    for mine, its in zip(encoder.parameters(), other.parameters()):
        mine.data.mul_(0.9).add_(its.data, alpha=0.1)


def by_numpy(encoder):
    encoder.layers[0].ffn1.down.weight.detach().numpy()[:] *= 1.5


@torch.no_grad()
def by_set(encoder):
    encoder.layers[0].ffn1.norm.weight.set_(torch.full((16,), 1.5))


CHANGES: dict[str, Callable[[ConformerEncoder], None]] = {
    "sgd": by_optimizer(torch.optim.SGD),
    "adamw foreach": by_optimizer(torch.optim.AdamW, foreach=True),
    "adamw fused": by_optimizer(torch.optim.AdamW, fused=True),
    "in place": by_gradient_free_write,
    "state dict": by_state_dict,
    "state dict assigned": lambda encoder: by_state_dict(encoder, assign=True),
    "half and back": by_losing_precision,
    "assignment": by_assignment,
    "assignment, same memory": by_assignment_in_the_same_memory,
    "module": by_new_module,
    "tied": by_tying,
    "vector": by_vector,
    "data": by_data,
    "data there and back": by_data_there_and_back,
    "data transposed": by_transposed_data,
    "data written": by_writing_data,
    "data averaged": by_averaging_data,
    "numpy": by_numpy,
    "set_": by_set,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_never_stale(change):
    encoder = make_encoder()
    before = check(encoder)
    change(encoder)
    encoder.eval()
    assert (check(encoder) - before).abs().max() > 1e-4


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("statistics", ["shared", "per_depth"])
def test_running_statistics(buffer, statistics):
    encoder = make_encoder(conv_norm="batch", conv_norm_statistics=statistics)
    before = check(encoder)
    owner = encoder if statistics == "per_depth" else encoder.layers[0].conv.depthwise_norm
    getattr(owner, buffer).add_(0.7)
    assert not torch.equal(check(encoder), before)
    encoder.train()
    encoder(torch.randn(2, 9, 16))
    encoder.eval()
    check(encoder)


@pytest.mark.parametrize("form", ["layer_norm", "step", "film", "lora"])
def test_conditioning(form):
    encoder = make_encoder(conditioning=(form,))
    before = check(encoder)
    with torch.no_grad():
        next(encoder.conditioning.parameters()).add_(0.3)
    assert not torch.equal(check(encoder), before)


@pytest.mark.parametrize("replacements", [1, 2])
def test_other_memory_at_the_same_address_is_seen(replacements):
    encoder, values = make_encoder(ffn_dim=640), np.random.randn(640, 16).astype(np.float32) / 4
    weight = encoder.layers[0].ffn1.up.weight
    weight.data = torch.from_numpy(values)
    before = check(encoder)
    values[1, 1] += 50.0
    for _ in range(replacements):  # each time another storage; at the second, that of the first is free again
        weight.data = torch.from_numpy(values)
    assert not torch.equal(check(encoder), before)


def test_a_counted_write_to_one_element_is_seen():
    encoder = make_encoder(ffn_dim=640)
    before = check(encoder)
    with torch.no_grad():
        encoder.layers[0].ffn1.up.weight[1, 1] += 50.0  # not one of the values that are looked at
    assert not torch.equal(check(encoder), before)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_of_an_optimizer_that_changes_one_element_is_seen(kind):
    encoder = make_encoder(ffn_dim=640)
    before, weight = check(encoder), encoder.layers[0].ffn1.up.weight
    optimizer = torch.optim.SGD([weight], lr=1.0, **kind)
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 1] = 50.0
    optimizer.step()
    assert not torch.equal(check(encoder), before)


def test_a_step_of_another_optimizer_packs_nothing(count_packs):
    encoder, other = make_encoder(), nn.Linear(3, 3)
    by("loop", encoder)
    other(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    by("loop", encoder)
    assert count_packs == [1]


def test_a_write_that_nothing_counts_to_one_element_is_seen_after_forget():
    encoder = make_encoder(ffn_dim=640)
    check(encoder)
    weight = encoder.layers[0].ffn1.up.weight.data  # 10,240 values, of which 64 are looked at
    weight[1, 1] += 50.0
    weights.forget(encoder)
    check(encoder)


def test_a_write_that_nothing_counts_to_one_element_is_seen_by_a_long_call():
    encoder = make_encoder(ffn_dim=640)
    frames = 256  # of two utterances, through three loops: beyond the number from which every value is compared
    by("loop", encoder, frames)
    weight = encoder.layers[0].ffn1.up.weight.data
    for index in ((1, 1), (639, 14), (17, 3)):
        weight[index] += 5.0
        torch.testing.assert_close(by("loop", encoder, frames), by("modules", encoder, frames), rtol=0, atol=1e-4)


def test_tensors_in_shared_memory_are_not_trusted():
    encoder = make_encoder(ffn_dim=640)
    check(encoder)
    encoder.share_memory()
    check(encoder)
    encoder.layers[0].ffn1.up.weight.data[1, 1] += 50.0  # as another process would
    check(encoder)
    assert encoder not in weights._kept


def test_tensors_of_inference_mode_are_not_trusted():
    with torch.inference_mode():
        encoder = make_encoder(ffn_dim=640)
        check(encoder)
        encoder.layers[0].ffn1.up.weight[1, 1] += 50.0
        check(encoder)
    check(encoder)
    assert encoder not in weights._kept


def test_inference_mode_and_no_grad_share_what_is_packed(count_packs):
    encoder = make_encoder()
    out = by("loop", encoder)
    with torch.inference_mode():
        assert torch.equal(by("loop", encoder), out)
    by("loop", encoder)
    assert count_packs == [1]


# kept, and how


@pytest.fixture
def count_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, pack = [0], weights.pack

    def counted(*args):
        count[0] += 1
        return pack(*args)

    monkeypatch.setattr(weights, "pack", counted)
    return count


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({}, 1),
        ({"sharing": "cycle:2"}, 2),
        ({"conditioning": ("step",)}, 1),
        ({"conditioning": ("lora",)}, 3),
        ({"conv_norm": "batch", "conv_norm_statistics": "per_depth"}, 3),
    ],
    ids=str,
)
def test_packed_once(count_packs, changes, packs):
    encoder = make_encoder(**changes)
    for frames in (9, 4, 9, 12):
        by("loop", encoder, frames)
    assert count_packs == [packs]
    with torch.no_grad():
        encoder.layers[0].norm.weight += 1
    by("loop", encoder)
    assert count_packs == [2 * packs]


def test_no_more_is_packed_than_runs(count_packs):
    encoder = make_encoder(sharing="none")
    with torch.no_grad():
        encoder(torch.randn(1, 5, 16), depth=1)
    assert count_packs == [1]


def test_not_part_of_the_encoder():
    encoder = make_encoder()
    keys, saved = list(encoder.state_dict()), pickle.dumps(encoder)
    attributes = {name: list(vars(module)) for name, module in encoder.named_modules()}
    by("loop", encoder)
    assert encoder in weights._kept
    assert list(encoder.state_dict()) == keys
    assert pickle.dumps(encoder) == saved
    assert {name: list(vars(module)) for name, module in encoder.named_modules()} == attributes


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_its_own(how):
    encoder = make_encoder()
    before = check(encoder)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(encoder, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(encoder) if how == "deepcopy" else pickle.loads(pickle.dumps(encoder))
    assert other not in weights._kept
    assert torch.equal(check(other), before)
    by_gradient_free_write(other)
    assert not torch.equal(check(other), before)
    assert torch.equal(check(encoder), before)


def test_ends_with_the_encoder():
    encoder = make_encoder()
    by("loop", encoder)
    kept, watching = len(weights._kept), weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert watching() is None
    finally:
        gc.enable()
    assert len(weights._kept) == kept - 1


def test_does_not_keep_replaced_memory():
    encoder = make_encoder()
    by("loop", encoder)
    weight = encoder.layers[0].ffn1.up.weight
    memory = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.randn(24, 16)
    assert memory.expired()


def test_weights_elsewhere_are_an_error():
    encoder = make_encoder().to("meta")
    with engine("loop"), torch.no_grad(), pytest.raises(ValueError, match="input is on cpu, weights are on meta"):
        encoder(torch.randn(1, 5, 16))


def test_positions_do_not_depend_on_what_ran_before():
    encoder = make_encoder()
    fresh = {frames: by("loop", copy.deepcopy(encoder), frames) for frames in (1, 7, 30, 203)}
    for frames in (7, 203, 30, 1, 7, 203):
        assert torch.equal(by("loop", encoder, frames), fresh[frames])


def test_threads():
    """Calls at the same time, of different lengths, and weights that change between rounds."""
    encoder = make_encoder()
    errors: list[BaseException] = []

    def work(frames: int, expected: torch.Tensor, start: threading.Barrier) -> None:
        try:
            start.wait()
            for _ in range(10):
                assert torch.equal(by("loop", encoder, frames), expected)
        except BaseException as error:
            errors.append(error)

    for _ in range(5):
        by_gradient_free_write(encoder)
        sizes = (5, 9, 9, 40)
        expected = [by("loop", copy.deepcopy(encoder), frames) for frames in sizes]
        start = threading.Barrier(len(sizes))
        threads = [threading.Thread(target=work, args=(*job, start)) for job in zip(sizes, expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors


# what is no weight


class Doubling(ConformerEncoder):
    def step(self, k, x, lengths, positions):
        return 2 * super().step(k, x, lengths, positions)


def another_step(encoder):
    encoder.step = lambda *args: 2 * ConformerEncoder.step(encoder, *args)


def another_class(encoder):
    encoder.__class__ = Doubling


def setting(name: str, value: object) -> Callable[[ConformerEncoder], None]:
    def change(encoder):
        owner, _, attribute = name.rpartition(".")
        setattr(encoder.layers[0].get_submodule(owner), attribute, value)

    return change


SETTINGS = {
    "activation": (setting("ffn1.activation", "relu"), "ffn1.activation is 'relu', but the config says 'silu'"),
    "position": (setting("attention.position", "none"), "attention.position is 'none', but the config says 'relative'"),
    "order": (setting("convolution_first", True), "convolution_first is True, but the config says False"),
    "epsilon": (setting("norm.eps", 0.5), "norm has an epsilon other than"),
    "another step": (another_step, r"the encoder has its own step\(\), which would not run"),
    "a subclass's step": (another_class, r"the encoder has its own step\(\), which would not run"),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_changed_at_run_time(change):
    """After the weights are packed: the modules decide, and the engine says why it does not serve."""
    encoder = make_encoder()
    before, (apply, reason) = check(encoder), SETTINGS[change]
    apply(encoder)
    x = torch.linspace(-2, 2, 2 * 9 * 16).sin().view(2, 9, 16)
    with torch.no_grad():
        out = encoder(x)[0]
        assert encoder.explain(x).engine == "modules"
    assert torch.equal(out, by("modules", encoder))
    assert (out - before).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match=reason):
        by("loop", encoder)


def test_the_config_of_the_convolution_at_run_time():
    """It decides over the padding, and over the norm that follows."""
    encoder = make_encoder()
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    with torch.no_grad():
        before = encoder(x, lengths)[0]
        encoder.layers[0].conv.config = BASE.replace(padding="peer")
        out = encoder(x, lengths)[0]
        with engine("modules"):
            assert torch.equal(out, encoder(x, lengths)[0])
    assert (out - before)[1, :4].abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match=r"conv\.config is not that of the encoder"):
        by("loop", encoder)


def test_copies_have_the_config_of_the_encoder():
    for again in (copy.deepcopy(make_encoder()), pickle.loads(pickle.dumps(make_encoder()))):
        check(again)
