"""The process that compiles for a GPU and interprets: Triton's own interpreter, which the other tests use, must be off there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ..extension.conftest import Worker

HOST = Path(__file__).with_name("host.py")


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory):
    """``ask(**question)`` -> the answer of ``host.py``."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("ptx")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    worker = Worker(
        [sys.executable, str(HOST)], env | {"TRITON_CACHE_DIR": str(folder / "cache")}, folder / "stderr.txt"
    )
    yield worker
    worker.close()
