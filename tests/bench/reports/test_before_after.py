"""The table of before and after is made of the result files, and names what it could not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from lcconformer.bench.reports import before_after, host_cost
from lcconformer.kernels.common import INTERPRETED

RESULTS = Path(__file__).parents[3] / "bench" / "results"

CASE = {
    "mode": "training", "batch": 32, "frames": 400, "d_model": 256, "ours_ms": 8.0, "eager_ms": 16.0, "compile_ms": 12.0,
    "kernels_a_layer": 70.5,
    "kernels_us": {
        "GEMM": [24.0, 200.0], "aten sum": [6.0, 9.0], "relpos_attention.backward_key": [4.0, 30.0],
        "relpos_attention.forward": [1.0, 50.0], "partials.accumulate": [1.0, 5.0],
    },
}  # fmt: skip
# 2 units of 32 utterances, 4 heads and 400^2 scores of 64 multiply-adds, over 132 multiprocessors of 2048 a cycle
TWO_UNITS = 2 * 32 * 4 * 400**2 * 64 / (132 * 2048) / 1e3


def cost(name: str, slots: int, tensor: float = 0.0, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "dtype": "bf16",
        "arch": 90,
        "batch": 32,
        "frames": 400,
        "slots": slots,
        "mma": 128.0,
        "trip": 600.0,
    }
    return {**row, "kilocycles": {"tensor": tensor}, **changes}


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """``lines(cases, costs)``: those of the tables, from files of these contents."""

    def make(cases: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[str]:
        kernels = [
            {"kernel": name, "element": "bfloat16", "arch": 90, "registers": 168, "stack": 0, "spills": 8}
            for name in ("a.rows_64", "a.rows_128", "b.reduce")
        ]
        files = {
            "triton_cost": {"triton": "9.9", "kernels": costs},
            "cuda_resources": {"nvcc": "13", "kernels": kernels},
            "cuda_cost": {
                "nvcc": "13",
                "triton": "9.9",
                "kernels": [
                    {
                        "norm": "none",
                        "channels": 256,
                        "arch": 90,
                        "batch": 32,
                        "frames": 400,
                        "microseconds": 6.5,
                        "bound": "l2",
                        "kilocycles": {"issue": 8.8},
                        "triton": 7.9,
                    },
                ],
            },
            "host_cost": {
                "machine": "M",
                "triton": "9.9",
                "launches_a_loop": 10.0,
                "microseconds_a_loop": 123.4,
                "launches_a_first_call": 122,
                "microseconds_a_first_call": 987.6,
            },
        }
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        monkeypatch.setattr(before_after, "RESULTS", tmp_path)
        return before_after.tables(cases).splitlines()

    return make


def cells(lines: list[str], start: str) -> list[str]:
    (found,) = [line for line in lines if line.startswith(start)]
    return found.removeprefix(start).split()


def test_every_number_of_now_is_of_the_files(lines):
    costs = [
        cost("relpos_attention.forward D=64", 1),
        cost("relpos_attention.forward D=64 dropout", 444, tensor=TWO_UNITS),
        cost("relpos_attention.forward D=128 dropout", 2),
        cost("relpos_attention.backward_key D=64", 121, tensor=TWO_UNITS / 4),
        cost("relpos_attention.backward_key D=64", 3, dtype="fp16"),
        cost("relpos_attention.backward_key D=64", 4, arch=80),
        cost("relpos_attention.backward_key D=64", 5, frames=100),
        cost("relpos_attention.backward_key D=64 packed", 6),
    ]
    text = lines([CASE, {**CASE, "d_model": 512}], costs)
    layer = (
        next(line for line in text if line.startswith("training (32,400)")).removeprefix("training (32,400)").split()
    )
    assert layer == ["126", "70.5", "-", "-", "16.0", "8.00", "1.2", "2.00", "0.8", "1.50"]
    of = "training (32,400)  relpos_attention."
    assert cells(text, f"{of}forward") == ["1.00", "688", "444", "2,359", "600", "128", "-", "2.00"]
    assert cells(text, f"{of}backward_key") == ["4.00", "992", "121", "3,661", "600", "128", "-", "2.00"]
    # the forward is no part of it
    assert cells(text, "training (32,400)  ... backward of attention")[-2:] == ["17", "2.00"]
    assert cells(text, "a.rows_64") == ["168", "0", "8"]
    assert cells(text, "b.reduce") == ["168", "0", "8"]
    assert cells(text, "none ") == ["256", "sm_90", "(32,400)", "6.50", "l2", "8.80", "7.90"]
    assert not [line for line in text if "a.rows_128" in line]
    assert [line for line in text if line.startswith("- issue slots of partials.accumulate: not in triton_cost.json")]


def test_the_chain_alone_has_a_time_of_the_host(lines):
    chain = {
        **CASE,
        "mode": "inference",
        "batch": 1,
        "frames": 100,
        "kernels_us": {"chain_products.residual_product": [4, 1.0]},
    }
    text = lines([chain], [cost("chain_products.residual_product K=1024 M=128", 92, batch=1, frames=100)])
    rows = [line for line in text if line.startswith("inference (1,100)")]
    assert rows[0].split()[2:8] == ["23", "70.5", "874", "to", "1,265", "123"]
    assert rows[1].split()[2:6] == ["chain_products.residual_product", "4.00", "-", "92.0"]


def test_the_filed_report_has_the_table_of_the_filed_numbers():
    filed = json.loads((RESULTS / "predicted.json").read_text())
    table = before_after.tables(filed["cases"])
    assert (RESULTS / "predicted.md").read_text().endswith(table), "make it anew: bench.reports.predicted"


def test_the_filed_cost_of_the_host_is_of_the_chain():
    filed = json.loads((RESULTS / "host_cost.json").read_text())
    assert filed["launches_a_loop"] == 10
    assert 0 < filed["microseconds_a_loop"] < 5000


def test_the_cost_of_the_host_needs_kernels_that_can_be_compiled(capsys):
    if not INTERPRETED:
        pytest.skip("a GPU is here: kernels are compiled")
    assert host_cost.main([]) == 2
    assert "unset it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cost_of_the_host(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lcconformer.bench.reports.host_cost", "--out", str(tmp_path / "h.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "h.json").read_text())
    assert found["launches_a_loop"] == 10
    assert found["microseconds_a_loop"] > 0
