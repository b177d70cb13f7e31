"""lcconformer.extension: the module as built here, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcconformer import extension

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def built():
    missing = extension.why_missing()
    if missing is not None:
        pytest.skip(missing)
    return extension.load()


def test_build_info_tells_what_was_built(built):
    info = extension.build_info()
    assert {"version", "compiler", "flags", "openmp", "simd", "cuda", "cuda_note"} <= info.keys()
    assert "generic" in info["simd"]
    assert built.cpu.simd_level() in info["simd"]
    assert hasattr(built, "cuda") == (info["cuda"] is not None)
    assert bool(info["cuda_note"]) == (info["cuda"] is None)


def test_pytorch_and_the_extension_share_one_openmp(built):
    program = (
        "from lcconformer import extension; import torch\n"
        "cpu = extension.load().cpu; torch.ones(1 << 20).add_(1)\n"
        "counts = []\n"
        "for n in (1, 2): torch.set_num_threads(n); counts.append(cpu.max_threads())\n"
        "print(counts, len(extension.openmp_runtimes()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[1, 2] 1", result.stdout


def run_copy(tmp_path: Path, *, extra: dict[str, bytes]) -> str:
    """What why_missing says in a package that has only the loader and the given files."""
    package = tmp_path / "alone"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(extension.__file__, package)
    for name, content in extra.items():
        (package / name).write_bytes(content)
    program = (
        "from alone import extension as e\nprint(e.why_missing())\n"
        "try: e.load()\nexcept ImportError as error: assert str(error) == e.why_missing()\nelse: raise SystemExit(1)\n"
        "assert e.cuda_reasons(90) == [e.why_missing()]"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    return result.stdout


def test_a_module_that_was_not_built(tmp_path):
    said = run_copy(tmp_path, extra={})
    assert "was not built when lcconformer was installed; reinstall" in said


def test_a_module_that_does_not_load(tmp_path):
    said = run_copy(tmp_path, extra={f"_C{SUFFIX}": b"\x7fELF no"})
    assert "lcconformer._C does not load: " in said
    assert "reinstall" in said


def test_a_module_of_another_python(tmp_path):
    said = run_copy(tmp_path, extra={"_C.cpython-23-x86_64-linux-gnu.so": b""})
    assert "built for another Python (_C.cpython-23-x86_64-linux-gnu.so); reinstall" in said


@pytest.mark.parametrize(("version", "said"), [(None, 1), (extension.INTERFACE + 1, extension.INTERFACE + 1)])
def test_a_module_of_another_source(tmp_path, version, said):
    """As after a pull without a new build: it loads, and its kernels would be called by the wrong names."""
    line = "" if version is None else f"interface = {version}\n"
    said_of_it = run_copy(tmp_path, extra={"_C.py": line.encode()})
    assert f"has interface {said}, and this source calls interface {extension.INTERFACE}; reinstall" in said_of_it


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        (["80"], 80, True),
        (["80"], 86, True),
        (["80"], 90, False),
        (["86"], 80, False),
        (["90+PTX"], 120, True),
        (["90+PTX"], 89, False),
        (["90a"], 90, True),
        (["100"], 103, True),
        (["100f"], 103, True),
        (["90a"], 100, False),
        (["80", "120"], 121, True),
    ],
)
def test_which_devices_the_built_architectures_serve(monkeypatch, archs, capability, serves):
    info = {"cuda": {"archs": archs}, "cuda_note": ""}
    monkeypatch.setattr(extension, "_attempt", lambda: SimpleNamespace(build_info=json.dumps(info)))
    reasons = extension.cuda_reasons.__wrapped__(capability)
    if serves:
        assert reasons == []
    else:
        assert f"built for {archs[0]}" in reasons[0]
        assert f"LCCONFORMER_CUDA_ARCHS={capability // 10}.{capability % 10}" in reasons[0]


def test_a_build_without_cuda_says_why(monkeypatch):
    info = {"cuda": None, "cuda_note": "no nvcc here"}
    monkeypatch.setattr(extension, "_attempt", lambda: SimpleNamespace(build_info=json.dumps(info)))
    reasons = extension.cuda_reasons.__wrapped__(90)
    assert reasons == ["lcconformer was built without CUDA kernels (no nvcc here)"]
