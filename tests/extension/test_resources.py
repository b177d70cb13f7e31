"""What nvcc makes of the CUDA kernels: budgets of the committed table, and the table against a fresh compilation."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest

from .building import CSRC, ROOT

sys.path.insert(0, str(CSRC))
import resources
import toolchain

CONVOLUTION = ("backward", "backward_layer", "row_moments", "reduce")
KERNELS = {
    *((f"glu_depthwise_conv.{name}", e) for name in CONVOLUTION for e in ("float32", "float16", "bfloat16")),
    *((f"glu_depthwise_conv.{name}", "float32") for name in ("forward", "forward_layer")),
    *(
        (f"{resources.PRODUCTS}{layer}{rows}", e)
        for layer in ("", "_layer")
        for rows in ("", "_unaligned")
        for e in ("float16", "bfloat16")
    ),
    *(
        (f"{name}_{d}", e)
        for name in (
            "relpos_attention.forward",
            *(f"relpos_attention_backward.{n}" for n in ("rows", "keys", "positions")),
        )
        for d in (32, 64, 96, 128)
        for e in ("float16", "bfloat16")
    ),
}
ON_90 = {
    ("cluster_loop.loops", "bfloat16", 90),
    ("cluster_phases.phases", "bfloat16", 90),
    *(
        (f"relpos_attention_warpgroups.warpgroups_{d}", e, 90)
        for d in (32, 64, 96, 128)
        for e in ("float16", "bfloat16")
    ),
}
TABLE = ROOT / "bench" / "results" / "cuda_resources.json"


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


def test_the_table_covers_every_kernel_on_every_architecture(table):
    got = {(row["kernel"], row["element"], row["arch"]) for row in table["kernels"]}
    assert got == {(*kernel, arch) for kernel in KERNELS for arch in resources.SHARED_MEMORY} | ON_90


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


@pytest.fixture
def compiled(table, monkeypatch):
    """``resources.main`` without nvcc: the committed table is what it would collect."""
    monkeypatch.setattr(resources.toolchain, "find_nvcc", lambda: toolchain.Nvcc("nvcc", table["nvcc"], CSRC))
    monkeypatch.setattr(resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(resources, "collect", lambda nvcc, compiler, archs: table)


def test_without_out_nothing_is_written(compiled, table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert resources.main([]) == 0
    assert capsys.readouterr().out.count(" registers, ") == len(table["kernels"])
    assert list(tmp_path.iterdir()) == []


def test_an_older_report_is_replaced(compiled, table, tmp_path):
    out = tmp_path / "report.json"
    for _ in range(2):
        assert resources.main(["--out", str(out)]) == 0
        assert json.loads(out.read_text()) == table
        assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == TABLE.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x02\x01\x01\0\xff", "_C.so is there and not JSON"),
        (b"", "_C.so is there and not JSON"),
        (b'{"triton": "3.9.0", "kernels": []}', "_C.so is JSON but not a report of this script"),
        (b"[1]", "_C.so is JSON but not a report of this script"),
    ],
)
def test_any_other_file_is_left_as_it_is(compiled, tmp_path, capsys, content, message):
    out = tmp_path / "_C.so"
    out.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        resources.main(["--out", str(out)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert out.read_bytes() == content
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_without_out_is_refused(tmp_path):
    """What used to overwrite the built library."""
    out = tmp_path / "_C.so"
    out.write_bytes(b"\x7fELF")
    done = subprocess.run([sys.executable, CSRC / "resources.py", out], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr
    assert out.read_bytes() == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_is_what_nvcc_says(table, gxx):
    nvcc = toolchain.find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    if nvcc.version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {nvcc.version}")
    assert shutil.which("c++"), "nvcc is here and its host compiler is not"
    fresh = resources.collect(nvcc, gxx, sorted(resources.SHARED_MEMORY))
    assert fresh == table, "run python csrc/resources.py --out bench/results/cuda_resources.json"
