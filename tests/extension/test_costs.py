"""What the model says of the CUDA convolution: the committed table, `auto` as the table has it, and a fresh compilation."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from lcconformer.ops.glu_depthwise_conv import OP, Traits, cuda
from lcconformer.ops.registry import backend

from .building import CSRC, ROOT

sys.path.insert(0, str(CSRC))
import costs
import toolchain

RESULTS = ROOT / "bench" / "results"
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def table():
    return json.loads((RESULTS / "cuda_cost.json").read_text())


@pytest.fixture
def on(monkeypatch):
    """``on(90)``: every backend can run, on a GPU of sm_90."""

    def make(capability: int) -> None:
        monkeypatch.setattr(cuda, "capability", lambda *_: capability)
        for served in ("cuda", "triton"):
            monkeypatch.setattr(OP.backends[served], "unsupported", lambda _: [])

    return make


def traits(norm: str, **changes: Any) -> Traits:
    norm_dtype = None if norm == "none" else torch.float32
    return Traits(GPU, torch.bfloat16, 256, norm, norm_dtype, False, "silu")._replace(**changes)


def test_the_table_has_every_case_of_tritons(table):
    got = [tuple(row[k] for k in ("norm", "channels", "arch", "batch", "frames")) for row in table["kernels"]]
    assert sorted(got) == sorted(
        (norm, c, arch, *shape)
        for norm, (channels, _, _) in costs.CASES.items()
        for c in channels
        for arch in costs.ARCHS
        for shape in costs.SHAPES
    )
    triton = json.loads((RESULTS / "triton_cost.json").read_text())
    filed = {(k["name"], k["arch"], k["batch"], k["frames"]): k["microseconds"] for k in triton["kernels"]}
    assert table["triton"] == triton["triton"]
    for row in table["kernels"]:
        name = costs.CASES[row["norm"]][2].format(row["channels"])
        assert row["triton"] == filed[name, row["arch"], row["batch"], row["frames"]]


def test_launches_are_what_the_header_says(table, gxx):
    segments = {case: found[0] for case, found in costs.launches(gxx).items()}
    for row in table["kernels"]:
        assert row["segments"] == segments[row["norm"], row["channels"], row["batch"], row["frames"]]


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_auto_takes_what_costs_less_in_every_case(table, on, norm):
    rows = [row for row in table["kernels"] if row["norm"] == norm]
    cheaper = all(row["microseconds"] < row["triton"] for row in rows)
    assert cheaper == (norm != "layer")
    for arch in costs.ARCHS:
        on(arch)
        assert OP.explain(traits(norm)).backend == ("cuda" if cheaper else "triton")
        assert bool(cuda.costlier(traits(norm))) != cheaper


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({"dtype": torch.float32}, 90, "float32 does without tensor cores"),
        ({"gradients": True}, 90, "its backward pass has no prediction"),
        ({"norm_dtype": torch.bfloat16}, 90, "norm_weight and the like are torch.bfloat16"),
        ({"channels": 260}, 90, "predictions are for channels in eights"),
        ({}, 120, "predictions are for sm_80 and sm_90"),
    ],
)
def test_without_a_prediction_it_serves_on_request(on, changes, capability, reason):
    on(capability)
    own = traits("batch", **changes)
    assert reason in cuda.costlier(own)
    choice = OP.explain(own)
    assert (choice.backend, choice.passed_over) == ("triton", ())
    with backend("cuda"):
        assert OP.explain(own).backend == "cuda"


def test_where_it_cannot_run_nothing_is_missed(on, monkeypatch):
    on(90)
    monkeypatch.setenv("LCCONFORMER_STRICT", "1")
    monkeypatch.setattr(OP.backends["cuda"], "unsupported", lambda _: ["not built"])
    choice = OP.explain(traits("none"))
    assert (choice.backend, choice.passed_over, choice.error) == ("triton", (), None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_is_what_nvcc_says(table, gxx):
    nvcc = toolchain.find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    nvdisasm = costs.disassembler(nvcc)
    if nvcc.version != table["nvcc"] or nvdisasm is None:
        pytest.skip(f"the table is of nvcc {table['nvcc']}; here are nvcc {nvcc.version}, nvdisasm {nvdisasm}")
    fresh = costs.collect(nvcc, nvdisasm, gxx)
    assert fresh == table, "run python csrc/costs.py --out bench/results/cuda_cost.json"
