"""Every mutation applies and names a test, MUTATIONS.md agrees with the list, and a run reports each outcome correctly.

The run itself takes minutes: ``python tests/mutations.py``.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import mutations
from .mutations import (
    CUDA,
    CUDA_OF_ATTENTION,
    CUDA_OF_ATTENTION_BACKWARD,
    CUDA_OF_CLUSTERS,
    CUDA_OF_WARPGROUPS,
    CXX,
    DISPATCH,
    EMULATOR,
    MUTATIONS,
    TRITON,
    Mutation,
)

ROOT = Path(__file__).parents[1]
TABLES = (ROOT / "tests" / "MUTATIONS.md").read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.name}")
def test_changes_one_place_and_names_a_test(mutation):
    text = (ROOT / mutation.file).read_text()
    assert mutation.of(text) != text
    path, _, test = mutation.test.partition("::")
    functions = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert test.partition("[")[0] in functions


@pytest.mark.parametrize(
    ("chosen", "folder"),
    [
        (TRITON, "tests/kernels/"),
        (CXX, "tests/extension/"),
        (CUDA, "tests/extension/test_cuda_glu_depthwise_conv.py::"),
        (CUDA_OF_ATTENTION, "tests/extension/test_cuda_relpos_attention.py::"),
        (CUDA_OF_ATTENTION_BACKWARD, "tests/extension/test_cuda_relpos_attention.py::"),
        (CUDA_OF_WARPGROUPS, "tests/extension/test_cuda_relpos_attention.py::"),
        (CUDA_OF_CLUSTERS, "tests/extension/test_cuda_cluster_loop.py::"),
        (EMULATOR, "tests/extension/test_emulator.py::"),
        (DISPATCH, "tests/"),
    ],
    ids=[
        "triton",
        "cxx",
        "cuda",
        "cuda attention",
        "cuda attention backward",
        "cuda warpgroups",
        "cuda clusters",
        "emulator",
        "dispatch",
    ],
)
def test_the_tables_have_a_row_for_each(chosen: Sequence[Mutation], folder):
    assert all(m.test.startswith(folder) for m in chosen)
    rows = "\n".join(f"| {m.name} | `{m.test.removeprefix(folder)}` |" for m in chosen)
    table = f"\n\n| change | caught by |\n|---|---|\n{rows}\n\n"
    assert table in TABLES, f"the table is to be{table}"


def test_each_is_filed_as_caught():
    """``python tests/mutations.py --out bench/results/mutations.json`` makes those that are not."""
    rows = json.loads((ROOT / "bench" / "results" / "mutations.json").read_text())
    filed = {(row["file"], row["name"]): row["result"] for row in rows}
    assert filed == {(m.file, m.name): "caught" for m in MUTATIONS}


def test_every_test_in_the_tables_exists():
    # the name of a file or of a function, wherever it is; the lists made by hand have no other check
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources.values()), re.MULTILINE))
    named = re.findall(r"test_\w+(?:\.py)?", TABLES)
    assert named
    assert not [name for name in named if name not in (sources if name.endswith(".py") else defined)]


def test_every_named_test_is_collected():
    named = list(dict.fromkeys(mutation.test for mutation in MUTATIONS))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *named]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert f"{len(named)} tests collected" in done.stdout


def test_a_change_of_two_places_is_refused():
    with pytest.raises(ValueError, match=r"name: 'x' occurs 2 times in toy\.py"):
        Mutation("name", "toy.py", "x", "y", "").of("x = x")


TOY = "def double(x):\n    return 2 * x\n"
TESTS = """
import sys
from types import ModuleType

import pytest
import toy


def test_two():
    assert toy.double(2) == 4


def test_zero():
    assert toy.double(0) == 0


def test_two_or_skip():
    if toy.double(2) != 4:
        pytest.skip("no such machine")


@pytest.fixture
def two():
    assert toy.double(2) == 4


def test_fixture(two):
    pass


def test_process():
    if toy.double(2) != 4:
        pytest.fail("its process stopped:\\nImportError: undefined symbol")


def test_from_elsewhere():
    if toy.double(2) != 4:
        module = sys.modules["lcconformer.kernels"] = ModuleType("lcconformer.kernels")
        module.__file__ = "/elsewhere/kernels.py"
        raise AssertionError
"""


@pytest.mark.parametrize(
    ("after", "test", "build", "result", "reason"),
    [
        ("3 * x", "test_two", "", "caught", "assert 6 == 4"),
        ("3 * x", "test_zero", "", "MISSED", ""),
        ("3 * x", "test_two", "build failed: no compiler", "BROKEN", "build failed: no compiler"),
        ("3 *", "test_two", "", "BROKEN", "error: collection failure"),
        ("y", "test_two", "", "BROKEN", "failure: NameError"),
        ("3 * x", "test_two_or_skip", "", "BROKEN", "skipped: no such machine"),
        ("3 * x", "test_fixture", "", "BROKEN", "error: failed on setup"),
        ("3 * x", "test_process", "", "BROKEN", "ImportError: undefined symbol"),
        ("3 * x", "test_from_elsewhere", "", "BROKEN", "not from the copy: /elsewhere/kernels.py"),
        ("3 * x", "test_three", "", "BROKEN", "not found"),
    ],
)
def test_answers(tmp_path, after, test, build, result, reason):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    mutation = Mutation("double", "toy.py", "2 * x", after, f"test_toy.py::{test}")
    found, why = mutations.check(mutation, tmp_path, lambda root: build)
    assert found == result, why
    assert reason in why
    assert (tmp_path / "toy.py").read_text() == TOY


def test_several_tests_without_a_change(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    tests = [f"test_toy.py::{test}" for test in ("test_two", "test_zero")]
    assert mutations.run_tests(tmp_path, tests) == ("passed", "")
    # a whole file is no narrow test
    assert mutations.run_tests(tmp_path, ["test_toy.py"])[0] == "broken"


def test_what_is_filed_as_caught_is_not_made_again(tmp_path, monkeypatch, capsys):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "toy.py").write_text(TOY)
    (checkout / "test_toy.py").write_text(TESTS)
    (checkout / "lcconformer").mkdir()
    (checkout / "lcconformer" / "__init__.py").touch()
    out = checkout / "mutations.json"
    of_old = {"file": "toy.py", "name": "of old", "test": "", "result": "caught", "sources": "", "commit": ""}
    out.write_text(json.dumps([of_old]))
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m toy"):
        subprocess.run(["git", *command.split()], cwd=checkout, check=True)
    monkeypatch.setattr(mutations, "CHECKOUT", checkout)
    changes = [
        Mutation("twice", "toy.py", "2 * x", "3 * x", "test_toy.py::test_two"),
        Mutation("sum", "toy.py", "2 * x", "3 + x", "test_toy.py::test_zero"),
        Mutation("unseen", "toy.py", "2 * x", "3 * x", "test_toy.py::test_zero"),
        Mutation("lost", "toy.py", "2 * x", "3 * x", "test_toy.py::test_three"),
    ]
    monkeypatch.setattr(mutations, "MUTATIONS", changes)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["mutations.py", "--jobs", "2", "--out", str(out), *more])
        status = mutations.main()
        return status, capsys.readouterr().out, {row["name"]: row["result"] for row in json.loads(out.read_text())}

    def dirty():
        return [row["name"] for row in json.loads(out.read_text()) if "-dirty" in row["commit"]]

    status, said, filed = run()
    assert status == 1
    assert filed == {"twice": "caught", "sum": "caught", "unseen": "MISSED"}
    assert "BROKEN  lost  test_toy.py::test_three without the change: broken" in said
    assert "2 of 4 caught" in said
    status, said, filed = run()
    assert "2 of 4 changes are filed as caught" in said
    assert "twice" not in said
    assert "MISSED  unseen" in said
    # another text of the file or of its test: to be seen again
    (checkout / "toy.py").write_text(TOY + "\n")
    assert not dirty()  # but for the file itself
    status, said, filed = run("--match", "sum")
    assert dirty() == ["sum"]
    assert "0 of 1 changes are filed as caught" in said
    assert "caught  sum" in said
    assert status == 0
