"""The tests of the CPU kernels once more, with the extension built under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .building import CSRC, HERE, ROOT, SANITIZE, build
from .conftest import sanitizer_environment

sys.path.insert(0, str(CSRC))
import toolchain

# a process whose lcconformer._C is the sanitized one
RUN = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("lcconformer._C", sys.argv[1])
module = sys.modules["lcconformer._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""
# of each op the grid of lengths, layouts and threads; what differs only in arithmetic is left out
CHOICE = "odd_lengths or head_widths or packed or parts or kernel_widths or channels or layouts or widths or threads"
CHOICE = f"({CHOICE} or counters) and not (203 and generic)"


@pytest.fixture(scope="module")
def sanitized_module(gxx: str) -> Path:
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]
    units = [(source, python) for source in (HERE / "sanitized_cpu_module.cpp", CSRC / "cpu/bindings.cpp")]
    units += [(CSRC / "cpu" / name, []) for name in ("dispatch.cpp", "fingerprint.cpp", "pool.cpp", "workspace.cpp")]
    for source in sorted(CSRC.glob("cpu/simd/*.cpp")):
        for level, flags in toolchain.simd_levels().items():
            units.append((source, [*SANITIZE, "-fopenmp", f"-DLCC_SIMD={level}", *flags]))
    return build("_C.so", units, ["-shared", "-fopenmp"], gxx)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_sanitizer_objects(sanitized_module, gxx):
    tests = sorted(str(p) for p in HERE.glob("test_cpu_*.py") if p != Path(__file__))
    command = [sys.executable, "-c", RUN, str(sanitized_module), "-q", "-x", "-p", "no:cacheprovider", "-k", CHOICE]
    done = subprocess.run(
        [*command, *tests], cwd=ROOT, env=sanitizer_environment(gxx), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_sanitizer_is_on(sanitized_module, gxx):
    """An output one row short is caught."""
    code = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, w, n = torch.randn(4, 16), torch.ones(16), torch.empty(3, 16)
cpu = module.cpu
args = cpu.ResidualLayerNormForward(element=cpu.Element.float32, rows=4, columns=16, x=x.data_ptr(), x_row_stride=16,
                                    weight=w.data_ptr(), bias=w.data_ptr(), n=n.data_ptr(), eps=1e-5, threads=1)
cpu.residual_layer_norm_forward(args)
"""
    command = [sys.executable, "-c", code, str(sanitized_module)]
    done = subprocess.run(command, env=sanitizer_environment(gxx), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
