"""Every shipped kernel configuration compiled ahead of time, without a GPU: shared memory, spills, tensor cores."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


from lcconformer.kernels import report
from lcconformer.kernels.common import INTERPRETED, AotConfig, LaunchConfig

from lcconformer.architectures import SHARED_MEMORY

TABLE = Path(__file__).parents[2] / "bench" / "results" / "triton_resources.json"


def run_report(*args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: interpreted kernels cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lcconformer.kernels.report", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def config(**changes: object) -> AotConfig:
    given = {
        "name": "op",
        "kernel": None,
        "signature": {},
        "constexprs": {},
        "dtype": "bf16",
        "launch": LaunchConfig(4, 2),
    }
    return AotConfig(**(given | {"tensor_cores": True, "spill_budget": 64} | changes))


def resources(**changes: object) -> report.Resources:
    given = {"registers": 100, "stack": 0, "shared": 1024, "instructions": 500, "tensor_core": 8}
    return report.Resources(**(given | {"tensor_core_kind": "HGMMA", "serialized": False} | changes))


@pytest.mark.parametrize(
    ("arch", "changes", "found"),
    [
        (90, {}, []),
        (90, {"stack": 64}, []),
        (90, {"stack": 72}, ["stack 72 > 64"]),
        (86, {"shared": 99 * 1024}, []),
        (86, {"shared": 99 * 1024 + 1}, ["shared memory 101377 > 101376"]),
        (80, {"tensor_core": 0, "tensor_core_kind": ""}, ["no tensor-core instructions"]),
        (80, {"tensor_core_kind": "HMMA"}, []),
        (90, {"tensor_core_kind": "HMMA"}, ["HMMA in place of HGMMA"]),
        (90, {"serialized": True}, ["products serialised (ptxas C7515)"]),
    ],
)
def test_violations(arch, changes, found):
    assert report.violations(config(), arch, resources(**changes)) == found


def test_float32_may_do_without_hgmma():
    assert report.violations(config(dtype="fp32"), 90, resources(tensor_core_kind="HMMA")) == []


def test_serialised_products_may_be_allowed():
    assert report.violations(config(may_serialize=True), 90, resources(serialized=True)) == []


def test_every_op_ships_kernels():
    ops = ("feed_forward", "glu_depthwise_conv", "relpos_attention", "residual_layer_norm")
    assert set(ops) <= set(report.kernel_modules())


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is here: kernels are compiled")
def test_interpreted_kernels_are_not_compiled():
    with pytest.raises(RuntimeError, match="unset it"):
        report.compile_config(config(), 90)


def test_attention_on_hopper():
    """The shape of the base model: no more than 64 bytes of spills in the forward, and warpgroup products throughout."""
    done = run_report("--op", "relpos_attention", "--arch", "90", "--match", "D=64 bf16", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    table = {row[0]: row for row in rows(done.stdout)}
    assert len(table) == 5
    for row in table.values():
        assert row[9].endswith("HGMMA"), row
    assert int(table["relpos_attention.forward D=64"][6]) <= 64


def test_rows_are_written(tmp_path):
    out = tmp_path / "rows.json"
    row = report.Row("op", "bf16", 90, 4, 2, "c0de", resources(stack=8), ())
    report.write([row.flat(), row.flat()], out)
    written = json.loads(out.read_text())
    assert written["triton"] == report.triton.__version__
    assert len(written["kernels"]) == 2
    assert written["kernels"][0].items() >= {"name": "op", "arch": 90, "stack": 8, "tensor_core_kind": "HGMMA"}.items()
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_the_filed_table_is_of_what_is_shipped():
    """What users read is what would be compiled today, and breaks no budget."""
    filed = json.loads(TABLE.read_text())["kernels"]
    shipped = [
        (config, arch)
        for module in report.kernel_modules()
        for arch in SHARED_MEMORY
        for config in report.configs(module, arch)
    ]
    names = [(r["name"], r["dtype"], r["arch"], r["num_warps"], r["num_stages"]) for r in filed]
    assert names == [(c.name, c.dtype, arch, c.launch.num_warps, c.launch.num_stages) for c, arch in shipped]
    fields = [f.name for f in dataclasses.fields(report.Resources)]
    for row, (config, arch) in zip(filed, shipped):
        used = report.Resources(**{name: row[name] for name in fields})
        assert report.violations(config, arch, used) == row["violations"] == [], row


def test_no_such_match_is_an_empty_table():
    done = run_report("--match", "nothing is called so")
    assert done.returncode == 0
    assert rows(done.stdout) == []


def test_without_triton_it_says_what_to_install():
    code = """
import runpy, sys
sys.modules["triton"] = None
runpy.run_module("lcconformer.kernels.report", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert 'pip install "lcconformer[triton]"' in line


def test_only_what_changed_is_compiled(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    some = ("--op", "partials", "--arch", "90", "--jobs", "1")
    assert len(rows(run_report(*some, "--out", str(first)).stdout)) == 3
    done = run_report(*some, "--changed", str(first), "--out", str(second))
    assert rows(done.stdout) == []
    assert f"3 of 3 configurations are as in {first}" in done.stderr
    assert second.read_bytes() == first.read_bytes()
    table = json.loads(first.read_text())
    table["kernels"][1] |= {"code": "another", "registers": 1}
    first.write_text(json.dumps(table))
    assert len(rows(run_report(*some, "--changed", str(first), "--out", str(first)).stdout)) == 1
    assert first.read_bytes() == second.read_bytes()


def test_a_table_of_another_triton_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"triton": "2.0", "kernels": []}')
    with pytest.raises(ValueError, match=r"of Triton 2\.0"):
        report.unchanged([], path)


SAMPLE = """
import sys
from pathlib import Path
from lcconformer.architectures import SHARED_MEMORY
from lcconformer.kernels import report
jobs = report.jobs_of(report.kernel_modules(), SHARED_MEMORY)
report.write((row.flat() for row in report.report(jobs[::12], 2)), Path(sys.argv[1]))
"""


@pytest.fixture
def same_triton():
    filed = json.loads(TABLE.read_text())["triton"]
    if filed != report.triton.__version__:
        pytest.skip(f"{TABLE.name} is of Triton {filed}, this is {report.triton.__version__}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("same_triton")
def test_budgets():
    """The filed rows, which break no budget, are of the very code that ships: all ops, configurations and architectures."""
    done = run_report("--changed", str(TABLE), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    command = f"python -m lcconformer.kernels.report --changed {TABLE.name} --out {TABLE.name}, in {TABLE.parent}"
    assert rows(done.stdout) == [], f"compiled otherwise than what is filed; file it: {command}\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("same_triton")
def test_what_is_filed_is_what_the_compiler_makes(tmp_path):
    """Every twelfth configuration."""
    out = tmp_path / "sample.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", SAMPLE, str(out)], env=env, check=True)
    filed = json.loads(TABLE.read_text())["kernels"]
    assert json.loads(out.read_text())["kernels"] == filed[::12]
