"""What nvcc makes of the CUDA kernels: budgets of the committed table, and the table against a fresh compilation."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest

from .conftest import CSRC, ROOT

sys.path.insert(0, str(CSRC))
import resources
import toolchain

TABLE = ROOT / "bench" / "results" / "cuda_resources.json"


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


def test_the_table_covers_every_kernel_on_every_architecture(table):
    got = {(row["kernel"], row["element"], row["arch"]) for row in table["kernels"]}
    kernels = [f"glu_depthwise_conv.{name}" for name in ("forward", "backward", "reduce")]
    elements = ("float32", "float16", "bfloat16")
    assert got == {(k, e, a) for k in kernels for e in elements for a in resources.SHARED_MEMORY}


def test_nothing_breaks_its_budget(table):
    assert resources.violations(table) == []


@pytest.mark.parametrize(
    ("key", "value"), [("registers", 200), ("spills", 4), ("stack", 8), ("static_shared", 99 << 10)]
)
def test_a_broken_budget_is_named(table, key, value):
    table = copy.deepcopy(table)
    row = next(r for r in table["kernels"] if r["arch"] == 120 and r["kernel"].endswith("forward"))
    row[key] = value
    assert any("sm_120" in found and row["kernel"] in found for found in resources.violations(table))


def test_shared_memory_is_what_the_headers_say(table, gxx):
    assert resources.dynamic_shared(gxx) == table["dynamic_shared"]


@pytest.mark.slow
def test_the_table_is_what_nvcc_says(table, gxx):
    nvcc = toolchain.find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    if nvcc.version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {nvcc.version}")
    assert shutil.which("c++"), "nvcc is here and its host compiler is not"
    fresh = resources.collect(nvcc, gxx, sorted(resources.SHARED_MEMORY))
    assert fresh == table, "run python csrc/resources.py bench/results/cuda_resources.json"
