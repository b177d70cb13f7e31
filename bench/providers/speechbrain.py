"""SpeechBrain's Conformer encoder by its own source, without the toolkit around it and its many dependencies."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .bare import bare_packages, folder_of

__all__ = ["missing", "source"]


def missing() -> str | None:
    """Return what keeps SpeechBrain's source from being imported; None: nothing."""
    return None if folder_of("speechbrain") else "SpeechBrain is not installed; pip install --no-deps speechbrain"


@contextlib.contextmanager
def source() -> Iterator[Any]:
    """Import SpeechBrain's ``Conformer`` for the block; torchaudio, which it does not call, need not fit torch."""
    torchaudio = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        with bare_packages("speechbrain"):
            yield importlib.import_module("speechbrain.lobes.models.transformer.Conformer")
    finally:
        del sys.modules["torchaudio"]
        if torchaudio is not None:
            sys.modules["torchaudio"] = torchaudio
