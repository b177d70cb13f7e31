"""Tuned launch configurations: candidates, files, choice; and the command, which needs a GPU for its clock alone."""

from __future__ import annotations

import json
import types

import pytest
import torch

pytest.importorskip("triton")

import triton
from lcconformer.kernels import residual_layer_norm, tuning
from lcconformer.kernels.common import LaunchConfig

from lcconformer import tune
from lcconformer.__main__ import main

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEURISTIC = LaunchConfig(4, 2, {"BLOCK_M": 32, "BLOCK_D": 64})
LIMITS = {"BLOCK_M": (16, 32)}
OTHER = LaunchConfig(8, 2, {"BLOCK_M": 16, "BLOCK_D": 64})
KEY = "op.forward float32 warps=4 stages=2 BLOCK_M=32 BLOCK_D=64"
GPU = "NVIDIA Some-GPU 80GB"
ON_GPU = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LCCONFORMER_TUNED", str(tmp_path))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.setattr(tuning, "_gpu", lambda index: GPU)
    return lambda: tuning.tuned("op.forward", ON_GPU, HEURISTIC, LIMITS)


def test_candidates_stay_within_limits():
    found = tuning.candidates(HEURISTIC, LIMITS)
    assert found[0] == HEURISTIC
    assert OTHER in found
    assert {c.blocks["BLOCK_M"] for c in found} == {16, 32}
    assert {c.blocks["BLOCK_D"] for c in found} == {64}
    assert {c.num_stages for c in found} == {1, 2, 3}
    assert len(found) == 8


SMALL = types.SimpleNamespace(
    op=None,
    batch=1,
    frames=21,
    d_model=16,
    ffn_dim=None,
    heads=1,
    kernel_size=3,
    norm="layer",
    dropout=0.0,
    dtype="float32",
)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2e-2)])
def test_every_candidate_computes_the_same(dtype, tolerance):
    for name, call in tune.calls(types.SimpleNamespace(**{**vars(SMALL), "dtype": dtype}), torch.device(DEVICE)):
        with tuning.watched() as (seen, forced):
            want = call()
            # products of float32 are the library's
            assert seen or (name, dtype) == ("feed_forward up", "float32")
            for key, candidates in list(seen.items()):
                # the interpreter knows neither warps nor stages
                for blocks in {tuple(c.blocks.items()) for c in candidates}:
                    forced[key] = next(c for c in candidates if tuple(c.blocks.items()) == blocks)
                    for got, expected in zip(call(), want, strict=True):
                        size = max([1.0, *expected.abs().flatten().tolist()])
                        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * size)
                del forced[key]


def test_what_an_earlier_choice_replaced_is_not_timed():
    """With the product that has LayerNorm inside, neither LayerNorm nor the plain product is launched any more."""
    args = types.SimpleNamespace(**{**vars(SMALL), "dtype": "float16"})
    (call,) = (call for name, call in tune.calls(args, torch.device(DEVICE)) if name == "feed_forward forward")

    def timer(call):
        with_norm = any("norm_up" in key and config.num_warps for key, config in tuning._forced.items())
        return 0.5 if with_norm else 1.0

    found = tune.tune("forward", call, timer)
    assert [key.split()[0] for key in found] == ["feed_forward.norm_up", "feed_forward.down"]


def test_a_filed_configuration_is_chosen(choose):
    assert choose() == HEURISTIC
    tuning.write(tuning.file_of(GPU), GPU, {KEY: OTHER})
    assert choose() == OTHER
    assert tuning.read(tuning.file_of(GPU)) == {KEY: OTHER}


@pytest.mark.parametrize(
    "given",
    [
        LaunchConfig(8, 2, {"BLOCK_M": 16, "BLOCK_D": 32}),
        LaunchConfig(8, 2, {"BLOCK_M": 64, "BLOCK_D": 64}),
        LaunchConfig(8, 2, {"BLOCK_M": 16}),
        LaunchConfig(3, 2, {"BLOCK_M": 16, "BLOCK_D": 64}),
    ],
)
def test_a_configuration_that_is_no_candidate_is_not_chosen(choose, given):
    tuning.write(tuning.file_of(GPU), GPU, {KEY: given})
    assert choose() == HEURISTIC


def test_files_of_others_are_not_read(choose):
    tuning.write(tuning.file_of("another GPU"), "another GPU", {KEY: OTHER})
    assert choose() == HEURISTIC
    assert triton.__version__ in tuning.file_of(GPU).name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"configs": [1]}', '{"configs": {"k": {"num_warps": 4}}}',
             json.dumps({"configs": {KEY: {"num_warps": "4", "num_stages": 2}}})],
)  # fmt: skip
def test_a_damaged_file_is_named_and_the_heuristic_chooses(choose, caplog, text):
    tuning.file_of(GPU).write_text(text)
    with pytest.raises(ValueError, match=tuning.file_of(GPU).name):
        tuning.read(tuning.file_of(GPU))
    assert choose() == choose() == HEURISTIC
    (record,) = caplog.records
    assert tuning.file_of(GPU).name in record.message


def test_the_fastest_candidate_wins():
    x, weight = torch.randn(9, 256, device=DEVICE), torch.ones(256, device=DEVICE)
    times = {(1, 4): 1.0, (2, 4): 0.9, (1, 2): 0.7, (2, 2): 0.8}

    def timer(call):
        call()
        ((_, config),) = tuning._forced.items()
        if config.num_stages == 2:
            return 0.99
        if (config.num_warps, config.blocks["BLOCK_M"]) not in times:
            raise triton.OutOfResources(1, 0, "shared memory")
        return times[config.num_warps, config.blocks["BLOCK_M"]]

    def call():
        residual_layer_norm.layer_norm(x, weight, weight, 1e-5, x.dtype)

    ((key, best),) = tune.tune("norm", call, timer).items()
    assert key == "residual_layer_norm.forward float32 warps=1 stages=1 BLOCK_M=4 BLOCK_D=256"
    assert best == LaunchConfig(1, 1, {"BLOCK_M": 2, "BLOCK_D": 256})
    times[1, 2] = times[2, 2] = times[2, 4] = 0.98  # not worth a change
    assert tune.tune("norm", call, timer)[key] == LaunchConfig(1, 1, {"BLOCK_M": 4, "BLOCK_D": 256})
    assert not tuning._forced
    assert tuning._seen is None


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here")
def test_without_a_gpu_the_command_says_so(capsys):
    assert main(["tune"]) == 2
    assert "this machine has none that torch can use; run it on the machine that will" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(tmp_path, capsys, monkeypatch):
    candidates = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *args: candidates(*args)[:2])  # each is compiled
    given = ["--batch", "2", "--frames", "64", "--d-model", "64", "--heads", "1", "--dtype", "float16"]
    assert main(["tune", *given, "--folder", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    table = tuning.read(path)
    assert len(table) >= 9
    assert f"{len(table)} configurations in {path}" in capsys.readouterr().out
