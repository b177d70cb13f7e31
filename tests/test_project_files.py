"""Files that other tools read agree with the package and with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lcconformer

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def load():
    return pytest.importorskip("yaml", reason="pip install 'lcconformer[test]'").safe_load


def test_citation(load):
    citation = load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == lcconformer.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2105.00812"


def test_changelog_has_this_version_and_its_sections():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert versions[0] == "Unreleased"
    assert versions[1] == lcconformer.__version__
    kinds = set(re.findall(r"^### (.+)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_version_is_that_of_the_package():
    assert re.search(r'^version = "(.+)"$', PYPROJECT, re.M).group(1) == lcconformer.__version__


def test_pre_commit_runs_the_linter_that_ci_runs(load):
    repos = load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("ruff-pre-commit"))
    assert f'"ruff=={ruff["rev"].removeprefix("v")}"' in PYPROJECT
    hooks = {hook["id"] for repo in repos for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy", "clang-format", "end-of-file-fixer"} <= hooks


def test_the_workflow_calls_what_decides(load):
    workflow = load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    (python,) = (step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {}))
    assert python == "3.11"


def test_wheels_are_built_for_what_the_package_supports(load):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML, and CI has it")
    project = tomllib.loads(PYPROJECT)
    wheels = project["tool"]["cibuildwheel"]
    versions = [int(name.removeprefix("cp3").removesuffix("-manylinux_*")) for name in wheels["build"].split()]
    assert project["project"]["requires-python"] == f">=3.{versions[0]}"
    assert versions == list(range(versions[0], versions[-1] + 1))
    script, readme = wheels["test-command"].removeprefix("python ").split()
    assert all((ROOT / path.removeprefix("{project}/")).is_file() for path in (script, readme))
    workflow = load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert "python -m cibuildwheel --output-dir dist" in commands
    assert "python -m build --sdist" in commands


def test_ci_builds_the_documentation_with_warnings_as_errors():
    step = re.search(
        r"^step \d+ \"documentation, types\" xargs .* <<'END'\n(.*?)^END$",
        (ROOT / ".ci" / "run").read_text(),
        re.M | re.S,
    )
    assert step
    assert re.search(r"^python -m sphinx .*-W.* docs build/docs$", step[1], re.M)


@pytest.mark.parametrize("name", ["bug", "feature", "performance"])
def test_issue_forms(load, name):
    form = load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    assert all(field["attributes"]["label"] for field in form["body"])
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required
    if name != "feature":
        assert "info" in required
