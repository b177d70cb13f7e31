"""The peers themselves, as installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def torchaudio_conformer() -> ModuleType:
    """torchaudio's own ``models/conformer.py``, by path: importing the package needs a matching CUDA runtime."""
    try:
        files = importlib.metadata.files("torchaudio") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchaudio is not installed; pip install 'lcconformer[test]'")
    (path,) = (f.locate() for f in files if str(f) == "torchaudio/models/conformer.py")
    spec = importlib.util.spec_from_file_location("torchaudio.models.conformer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
