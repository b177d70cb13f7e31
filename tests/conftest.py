"""What every test shares: seeds, threads, the GPU marker, and where the larger speech data lies."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


# Triton reads this when it decorates a kernel: without a GPU the kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # tensors here are too small to share among threads, and on a busy machine threads wait for one another
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the speech archives (``ls_dev20.zip``, ...): LCCONFORMER_SHARED_DATA, or shared/data beside the checkout."""
    given = os.environ.get("LCCONFORMER_SHARED_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        if given:
            raise FileNotFoundError(f"LCCONFORMER_SHARED_DATA is {given!r}, which is no folder")
        pytest.skip(f"no speech data at {path}; set LCCONFORMER_SHARED_DATA to the folder of the archives")
    return path
