"""What the build decides from the machine and the environment: nvcc, architectures, jobs, compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .building import CSRC

sys.path.insert(0, str(CSRC))
import toolchain

# answers --version, --list-gpu-code and --dryrun as nvcc does
FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {minor}, V{minor}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\nsm_120\\n' ;;
  --dryrun) case "$*" in *sm_80a*|*sm_90f*) exit 1 ;; esac; echo '#$ _SPACE_=' >&2; echo '#$ TOP={root}' >&2 ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """``toolkit(name)`` makes a CUDA toolkit in a folder of that name; none other is found, nor a GPU."""
    for name in ("CUDACXX", "CUDA_HOME", "LCCONFORMER_CUDA_ARCHS", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("-packages")])

    def make(name: str, minor: str = "13.0", cudart: bool = True) -> Path:
        root = tmp_path / name
        (root / "bin").mkdir(parents=True)
        (root / "lib").mkdir()
        if cudart:
            (root / "lib" / "libcudart_static.a").touch()
        nvcc = root / "bin" / "nvcc"
        nvcc.write_text(FAKE_NVCC.format(root=root, minor=minor))
        nvcc.chmod(0o755)
        return root

    return make


def test_nvcc_is_looked_for_in_order(toolkit, monkeypatch, tmp_path):
    assert toolchain.find_nvcc() == "no nvcc in CUDACXX, CUDA_HOME, PATH or the nvidia-cuda-nvcc package"
    wheel = toolkit("site-packages/nvidia/cu13")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site-packages")])
    assert toolchain.find_nvcc().root == wheel
    on_path = toolkit("on_path")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    assert toolchain.find_nvcc().root == on_path
    home = toolkit("home")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolchain.find_nvcc().root == home
    named = toolkit("named")
    monkeypatch.setenv("CUDACXX", str(named / "bin" / "nvcc"))
    found = toolchain.find_nvcc()
    assert (found.root, found.version, found.cudart_static()) == (named, "13.0.88", named / "lib/libcudart_static.a")


def test_an_nvcc_that_cannot_serve_is_explained(toolkit, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert "nowhere/bin/nvcc does not run" in toolchain.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(toolkit("old", minor="11.8")))
    assert "is CUDA 11.8.88; 12.0 or newer is needed" in toolchain.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(toolkit("partial", cudart=False)))
    assert "has no libcudart_static.a" in toolchain.find_nvcc()


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("80 90a,12.0", ["80", "90a", "120"]),
        ("9.0a;10.0a 10.0f+PTX", ["90a", "100a", "100f+PTX"]),
        ("9.0 9.0", ["90"]),
        # by default what this nvcc cannot build is left out
        ("", ["80", "90+PTX", "100", "120"]),
    ],
)
def test_architectures(toolkit, monkeypatch, asked, archs):
    monkeypatch.setenv("CUDA_HOME", str(toolkit("cuda")))
    monkeypatch.setenv("LCCONFORMER_CUDA_ARCHS", asked)
    assert toolchain.architectures(toolchain.find_nvcc()) == archs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hopper", "cannot read 'hopper'; write it like"),
        ("8.6", r"cannot build 8.6; it can build 80, 90, 100, 120"),
        ("8.0a", "cannot build 8.0a"),
        ("9.0f", "cannot build 9.0f"),
        ("7.5", "cannot build 7.5"),
    ],
)
def test_architectures_that_cannot_be_built(toolkit, monkeypatch, asked, message):
    monkeypatch.setenv("CUDA_HOME", str(toolkit("cuda")))
    monkeypatch.setenv("LCCONFORMER_CUDA_ARCHS", asked)
    with pytest.raises(ValueError, match=message):
        toolchain.architectures(toolchain.find_nvcc())


def test_the_gpu_present_is_the_default(toolkit, monkeypatch, tmp_path):
    root = toolkit("cuda")
    smi = root / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n12.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"))
    assert toolchain.architectures(toolchain.find_nvcc()) == ["90", "120"]


def test_gencode():
    assert toolchain.gencode(["80", "90+PTX"]) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


@pytest.mark.parametrize(
    ("archs", "own"),
    [
        (["80", "90+PTX"], ["80", "90+PTX", "90a"]),
        (["80", "90"], ["80", "90a"]),
        (["90a"], ["90a"]),
        (["80", "100+PTX"], ["80", "100+PTX"]),
    ],
)
def test_features_of_sm_90_are_built_where_it_is(archs, own):
    assert toolchain.with_own_features(archs) == own
    assert all(source.exists() for source in toolchain.OF_90A)


@pytest.mark.parametrize(("gib", "jobs"), [(1, 1), (5, 2), (100, 4)])
def test_jobs_fit_memory_and_cores(monkeypatch, gib, jobs):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(toolchain, "free_memory", lambda: gib << 30)
    assert toolchain.max_jobs() == jobs


def test_jobs_asked_for(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.max_jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ValueError, match="MAX_JOBS is 'many'; expected a positive number"):
        toolchain.max_jobs()


def test_free_memory_is_of_this_machine():
    assert 1 << 26 < toolchain.free_memory() < 1 << 50


def test_no_compiler_is_explained(toolkit, monkeypatch):
    assert toolchain.find_compiler() == "no C++ compiler on PATH (c++, g++, clang++)"
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    assert "/nowhere/c++ -m64 cannot build a Python module" in toolchain.find_compiler()


def test_compiler(gxx):
    compiler = toolchain.find_compiler()
    assert not isinstance(compiler, str)
    assert compiler.openmp
    assert "(" in compiler.version
