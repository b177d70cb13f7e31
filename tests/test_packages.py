"""Every folder with modules is in the list of packages that setuptools installs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML, and CI has it")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {"lcconformer": "lcconformer", **setuptools["package-dir"]}
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in places.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found
