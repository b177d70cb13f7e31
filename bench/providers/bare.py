"""Importing parts of a package without running the ``__init__`` of its packages, which may need much that is not installed."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["bare_packages", "folder_of"]


class _BarePackages:
    """Finds the packages within one folder as empty ones."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        directory = self.root.joinpath(*name.split(".")[1:])
        if name.partition(".")[0] != self.name or not directory.is_dir():
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(directory)]
        return spec


def folder_of(name: str) -> Path | None:
    """Return the folder of an installed package; None: it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


@contextlib.contextmanager
def bare_packages(name: str) -> Iterator[None]:
    """Let modules of the installed package ``name`` be imported alone inside the block; they are forgotten behind it."""
    folder = folder_of(name)
    assert folder is not None
    finder: Any = _BarePackages(name, folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
