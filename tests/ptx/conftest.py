"""The process that compiles for a GPU and interprets; Triton's own interpreter, which other tests use, is off there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ..extension.building import CSRC
from ..extension.conftest import Worker

sys.path.insert(0, str(CSRC))
import toolchain

HERE = Path(__file__).parent
HOST = HERE / "host.py"


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


@pytest.fixture(scope="session")
def cuda_kernels(tmp_path_factory: pytest.TempPathFactory):
    """``cuda_kernels(arch)`` -> what ``ask`` needs to run csrc/cuda: the module that records launches, and nvcc's PTX."""
    missing = [tool for tool in ("nvcc", "g++", "nm", "c++filt") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}; the CUDA kernels are compiled to PTX")
    import pybind11

    folder, sources = tmp_path_factory.mktemp("cuda"), sorted(map(str, CSRC.glob("cuda/*.cu")))
    module = folder / "launches.so"
    include = [f"-I{p}" for p in (HERE / "launches", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    subprocess.run(
        ["g++", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-DLCC_EMULATION", *include,
         str(HERE / "launches/module.cpp"), str(CSRC / "cuda/bindings.cpp"), "-x", "c++", *sources, "-o", str(module)],
        check=True,
    )  # fmt: skip

    def compiled(arch: int) -> dict[str, object]:
        texts = []
        for source in sources:
            own = Path(source) in toolchain.OF_90A
            if own and arch != 90:
                continue
            text = folder / f"{Path(source).stem}_{arch}.ptx"
            if not text.exists():
                command = [
                    "nvcc",
                    "-ptx",
                    "-std=c++17",
                    "--expt-relaxed-constexpr",
                    f"-arch=compute_{arch}{'a' * own}",
                    f"-I{CSRC}",
                ]
                subprocess.run([*command, source, "-o", str(text)], check=True)
            texts.append(str(text))
        return {"module": str(module), "texts": texts}

    return compiled
