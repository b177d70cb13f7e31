"""The peers themselves, as installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType

import pytest

from lcconformer.interop import engine, layer


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


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """What computed the layers that ours stood in for: ``"engine"`` or ``"ops"``, an entry each."""
    found: list[str] = []
    for where, name, say in ((engine.inference, "run_layer", "engine"), (layer, "run", "ops")):
        own = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, own=own, say=say: (found.append(say), own(*a))[1])
    return found
