"""Builds csrc for the CPU: the emulated CUDA kernels under AddressSanitizer and UBSan, and a process that runs them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent

LANGUAGE = ("-std=c++17", "-fPIC", "-DLCC_EMULATION", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.fixture(scope="session")
def gxx() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("no g++ on PATH: the emulated kernels are built with it")
    return path


def build(name: str, units: Sequence[tuple[Path, Sequence[str]]], link: Sequence[str], gxx: str) -> Path:
    """Compile (source, flags) units and link them; what a file and its headers say decides whether it is compiled again."""
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    objects, running = [], []
    for source, flags in units:
        key = hashlib.sha256(repr((LANGUAGE, sys.version, source, flags)).encode())
        for path in sorted(included(source)):
            key.update(path.read_bytes())
        out = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        objects.append(str(out))
        if not out.exists():
            command = [gxx, *LANGUAGE, *flags, f"-I{CSRC}", "-x", "c++", "-c", source, "-o", _part(out)]
            running.append((out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    errors = "".join(process.communicate()[1] for _, process in running)
    assert not any(process.returncode for _, process in running), errors
    for out, _ in running:
        os.replace(_part(out), out)
    target = folder / hashlib.sha256(repr((objects, link)).encode()).hexdigest()[:16] / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        subprocess.run([gxx, "-fsanitize=address,undefined", *objects, *link, "-o", _part(target)], check=True)
        os.replace(_part(target), target)
    return target


def included(source: Path) -> set[Path]:
    """The source and every header of ours that it includes, directly or not."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        found.add(path)
        names = re.findall(r'^ *# *include "(.+)"', path.read_text(), re.MULTILINE)
        beside = [path.parent / name for name in names]
        headers = [near if near.exists() else CSRC / name for near, name in zip(beside, names)]
        left += [header for header in headers if header not in found]
    return found


def _part(out: Path) -> Path:
    """Where this process writes ``out`` before it is whole: others may build the same."""
    return out.with_name(f"{out.name}.{os.getpid()}")


@pytest.fixture(scope="session")
def emulated_module(gxx: str) -> Path:
    """The launchers of ``_C.cuda`` as a module that runs them on the CPU."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]
    kernels = [(source, SANITIZE) for source in sorted(CSRC.glob("cuda/*.cu"))]
    bindings = [(source, python) for source in (CSRC / "cuda/bindings.cpp", CSRC / "emulation/module.cpp")]
    return build("emulated.so", [*kernels, *bindings], ["-shared"], gxx)


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
