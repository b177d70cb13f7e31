"""The emulated CUDA kernels as a module, and a process that runs them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from .building import CSRC, build, emulated_kernels


@pytest.fixture(scope="session")
def gxx() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("no g++ on PATH: the emulated kernels are built with it")
    return path


@pytest.fixture(scope="session")
def emulated_module(gxx: str) -> Path:
    """The launchers of ``_C.cuda`` as a module that runs them on the CPU."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]
    bindings = [(source, python) for source in (CSRC / "cuda/bindings.cpp", CSRC / "emulation/module.cpp")]
    return build("emulated.so", [*emulated_kernels(), *bindings], ["-shared"], gxx)


def sanitizer_environment(gxx: str) -> dict[str, str]:
    """Python itself is not sanitized: the runtime is loaded before it. What Python leaks is not our concern."""
    # with libstdc++, whose __cxa_throw the runtime wraps and must find at its start
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.check_output([gxx, f"-print-file-name={name}"], text=True).strip() for name in names]
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


class Worker:
    """A process that answers each case, a line of JSON, with a line of JSON; a crash is an answer too."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path):
        self.command, self.env, self.log = command, env, log
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, **case: Any) -> Any:
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    self.command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.close()
            pytest.fail(f"the emulated kernel stopped its process:\n{self.log.read_text()[-6000:]}")
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker(request, emulated_module, gxx, tmp_path_factory):
    """``worker(**case)`` -> the answer of the test module's ``cases``, run as a program on the emulated kernels."""
    command = [sys.executable, request.module.cases.__file__, str(emulated_module)]
    worker = Worker(command, sanitizer_environment(gxx), tmp_path_factory.mktemp("emulated") / "stderr.txt")
    yield worker
    worker.close()
