"""pip builds and installs the package on machines of every kind; PyTorch is never there while it builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .building import CSRC, ROOT

sys.path.insert(0, str(CSRC))
import toolchain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BUILD_MINUTES = 5
SWITCHES = ("LCCONFORMER_CUDA", "LCCONFORMER_CUDA_ARCHS", "CUDA_HOME", "CUDACXX", "CXX", "MAX_JOBS", "PYTHONPATH")

# run where PyTorch is, from the installed copy: what was built, and does the package work
PROBE = """
import json, sys, torch
# an editable install beside the tests would lend its modules to the package under test
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import lcconformer
from lcconformer import extension, ops
assert lcconformer.__file__.startswith(sys.argv[1]), lcconformer.__file__
x = torch.randn(1, 9, 8)
assert ops.glu_depthwise_conv(x, torch.randn(4, 3)).shape == (1, 9, 4)
missing = extension.why_missing()
built = {} if missing else extension.build_info()
print(json.dumps({"missing": missing, "runtimes": len(extension.openmp_runtimes()), **built}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Of a fresh virtual environment: pip and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    path = folder / "bin" / "python"
    assert subprocess.run([path, "-c", "import torch"], capture_output=True).returncode, (
        "PyTorch in a fresh environment"
    )
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, python) -> Path:
    """Made by the build backend from a copy of the tree, so that nothing but the archive reaches the tests."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", ".*cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    subprocess.run([python, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([python, "-m", "build", "-q", "--sdist", "-o", folder, tree], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    kept = os.pathsep.join(f for f in folders if not os.access(os.path.join(f, "nvcc"), os.X_OK))
    if shutil.which("g++", path=kept) is None:
        pytest.skip("nvcc and g++ are in one folder: a PATH without nvcc would have no compiler")
    return kept


@pytest.fixture
def install(tmp_path, python, sdist):
    """``install(**environment)`` builds a wheel of the sdist, unpacks it, and tells what it holds and what pip said."""

    def run(**environment: str) -> dict[str, Any]:
        env = {k: v for k, v in os.environ.items() if k not in SWITCHES} | environment
        command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, sdist]
        built = subprocess.run(command, env=env, capture_output=True, text=True, timeout=BUILD_MINUTES * 60)
        wheels = list(tmp_path.glob("*.whl"))
        if built.returncode:
            assert not wheels
            return {"failed": built.stdout + built.stderr}
        target = tmp_path / "installed"
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *wheels], check=True)
        command = [sys.executable, "-c", PROBE, str(target)]
        env = {**os.environ, "PYTHONPATH": str(target)}
        probe = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert probe.returncode == 0, probe.stderr
        return {"said": built.stdout + built.stderr, "wheel": wheels[0], **json.loads(probe.stdout)}

    return run


def needs_nvcc() -> str:
    nvcc = toolchain.find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    return nvcc.path


def test_the_sdist_holds_what_the_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py", "bench/__init__.py"} <= names


def test_with_nvcc(install):
    nvcc = needs_nvcc()
    got = install(CUDACXX=nvcc, LCCONFORMER_CUDA="1", LCCONFORMER_CUDA_ARCHS="9.0")
    assert got["missing"] is None
    assert got["cuda"]["archs"] == ["90"]
    assert got["cuda_note"] == ""
    assert got["runtimes"] == 1
    with zipfile.ZipFile(got["wheel"]) as wheel:
        names = wheel.namelist()
    assert any(n.startswith("lcconformer/_C.") for n in names)
    assert {"lcconformer/kernels/__init__.py", "lcconformer/bench/__init__.py"} <= set(names)
    assert not any(n.startswith(("csrc/", "kernels/", "bench/")) for n in names)


def test_without_nvcc(install):
    got = install(PATH=path_without_nvcc())
    assert got["missing"] is None
    assert got["cuda"] is None
    assert got["cuda_note"].startswith("no nvcc in CUDACXX, CUDA_HOME, PATH")
    assert "lcconformer: no CUDA kernels: no nvcc" in got["said"]
    assert "LCCONFORMER_CUDA=1 pip install ." in got["said"]


def test_with_nvcc_from_pip(install):
    got = install(PATH=path_without_nvcc(), LCCONFORMER_CUDA="1", LCCONFORMER_CUDA_ARCHS="9.0")
    assert got["cuda"]["archs"] == ["90"]
    assert got["cuda"]["version"].startswith(toolchain.CUDA_MINOR)


def test_without_a_compiler(install):
    got = install(CXX="/nowhere/c++")
    assert "lcconformer._C was not built when lcconformer was installed" in got["missing"]
    assert "lcconformer: /nowhere/c++ cannot build a Python module" in got["said"]


@pytest.fixture
def broken_nvcc(tmp_path) -> str:
    """An nvcc that answers every question and compiles nothing."""
    real = needs_nvcc()
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(
        '#!/bin/sh\nfor a; do case "$a" in --dryrun|--version|--list-gpu-code) '
        f'exec {real} "$@" ;; esac; done\necho "kernel.cu(1): error: this nvcc is broken" >&2\nexit 2\n'
    )
    wrapper.chmod(0o755)
    return str(wrapper)


def test_cuda_that_does_not_compile_leaves_the_cpu_part(install, broken_nvcc):
    got = install(CUDACXX=broken_nvcc, LCCONFORMER_CUDA_ARCHS="9.0")
    assert got["missing"] is None
    assert got["cuda"] is None
    assert got["cuda_note"] == "did not compile: kernel.cu(1): error: this nvcc is broken"
    assert "building the CPU part only" in got["said"]


def test_cuda_demanded_and_not_compiling_installs_nothing(install, broken_nvcc):
    got = install(CUDACXX=broken_nvcc, LCCONFORMER_CUDA="1", LCCONFORMER_CUDA_ARCHS="9.0")
    assert "kernel.cu(1): error: this nvcc is broken" in got["failed"]


def test_a_wrong_switch_is_refused(install):
    got = install(LCCONFORMER_CUDA="yes")
    assert "LCCONFORMER_CUDA is 'yes'; expected 0 or 1" in got["failed"]


def test_editable(tmp_path, python):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", ".*cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    env = {k: v for k, v in os.environ.items() if k not in SWITCHES} | {"LCCONFORMER_CUDA": "0"}
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", tree], check=True, env=env)
    (module,) = (tree / "lcconformer").glob("_C.*.so")
    env = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", PROBE, str(tree)]
    probe = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(probe.stdout)["cuda_note"] == "switched off by LCCONFORMER_CUDA=0"
    # the same tree, its compiler gone: the old module must not stay
    env = {**os.environ, "CXX": "/nowhere/c++"}
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", tree], check=True, env=env)
    assert not module.exists()
