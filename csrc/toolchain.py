"""The tools that build the extension: C++ compiler, nvcc, ninja, architectures, number of jobs.

Used by setup.py and by the tests; needs the standard library only, so that a build environment needs no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CUDA_MINOR = "13.0"
# one minor version of all five: nvcc refuses headers and a cicc of another one
CUDA_PACKAGES = tuple(
    f"nvidia-{name}=={CUDA_MINOR}.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
)
# sm_86 and sm_89 run the sm_80 code, sm_103 the sm_100 code; PTX of 9.0 is there for parts that come later
DEFAULT_ARCHS = "8.0 9.0+PTX 10.0 12.0"
# csrc/cpu/simd/*.cpp is compiled once per level with -DLCC_SIMD=<level>; the processor chooses at run time
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
SIMD_LEVELS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
# what uses features that sm_90a alone has: for the others it is compiled to a trap that nothing launches
OF_90A = (Path(__file__).resolve().parent / "cuda/relpos_attention_warpgroups.cu",)
JOB_MEMORY = 2 << 30  # bytes; nvcc peaks below 1 GiB on the kernels here, g++ at 0.6 GiB on the bindings


def run(command: Sequence[str | os.PathLike[str]], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Output captured, errors left to the caller; a missing program counts as a failed one."""
    try:
        return subprocess.run([os.fspath(c) for c in command], capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


@dataclass(frozen=True)
class Compiler:
    """A C++17 compiler that can build Python modules."""

    command: tuple[str, ...]
    version: str
    openmp: bool


def find_compiler() -> Compiler | str:
    """The compiler of ``CXX`` or PATH, proven on a small module; else the reason in words."""
    if os.name != "posix":
        return f"no build is set up for {platform.system()}"
    asked = os.environ.get("CXX")
    command = shlex.split(asked) if asked else [p for p in map(shutil.which, ("c++", "g++", "clang++")) if p][:1]
    if not command:
        return "no C++ compiler on PATH (c++, g++, clang++)"
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <string_view>\nstd::string_view probe() { return {}; }\n")
        compiles = [*command, "-std=c++17", "-fPIC", f"-I{sysconfig.get_paths()['include']}"]
        result = run([*compiles, "-c", source, "-o", f"{tmp}/probe.o"])
        if result.returncode:
            return f"{shlex.join(command)} cannot build a Python module: {first_error(result.stderr)}"
        source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        openmp = run([*compiles, "-fopenmp", "-shared", source, "-o", f"{tmp}/probe.so"]).returncode == 0
    return Compiler(tuple(command), run([*command, "--version"]).stdout.splitlines()[0], openmp)


def first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")


@dataclass(frozen=True)
class Nvcc:
    """An nvcc and the toolkit around it."""

    path: str
    version: str
    root: Path

    def include_dirs(self) -> list[Path]:
        return [p for p in (self.root / "include", self.root / "include/cccl") if p.is_dir()]

    def cudart_static(self) -> Path | None:
        lib_dirs = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        return next((p for d in lib_dirs if (p := self.root / d / "libcudart_static.a").exists()), None)


def find_nvcc() -> Nvcc | str:
    """CUDACXX, CUDA_HOME, PATH, then the pip packages; the first that is there decides. Else the reason in words."""
    home = os.environ.get("CUDA_HOME")
    asked = os.environ.get("CUDACXX") or (os.path.join(home, "bin", "nvcc") if home else None)
    wheels = [os.path.join(p, "nvidia", "cu13", "bin", "nvcc") for p in sys.path]
    path = asked or shutil.which("nvcc") or next((p for p in wheels if os.access(p, os.X_OK)), None)
    if path is None:
        return "no nvcc in CUDACXX, CUDA_HOME, PATH or the nvidia-cuda-nvcc package"
    # a dry run tells the toolkit's root even where nvcc is a wrapper script or a link
    dry = run([path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(.*)$", dry.stderr, re.MULTILINE)
    version = re.search(r"V(\d+\.\d+\.\d+)", run([path, "--version"]).stdout)
    if top is None or version is None:
        return f"{path} does not run: {first_error(dry.stderr)}"
    root = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    nvcc = Nvcc(path, version[1], Path(root[1] if root else os.path.dirname(top[1])).resolve())
    if int(nvcc.version.split(".")[0]) < 12:
        return f"{path} is CUDA {nvcc.version}; 12.0 or newer is needed"
    if nvcc.cudart_static() is None:
        return f"{nvcc.root} has no libcudart_static.a"
    return nvcc


def architectures(nvcc: Nvcc) -> list[str]:
    """``["80", "90+PTX"]`` from ``LCCONFORMER_CUDA_ARCHS`` ("8.0;9.0+PTX"), the GPU present, or the default list.

    Raises:
        ValueError: an architecture was asked for that is malformed or that this nvcc cannot compile.
    """
    known = set(re.findall(r"sm_(\d+[af]?)", run([nvcc.path, "--list-gpu-code"]).stdout))
    asked = os.environ.get("LCCONFORMER_CUDA_ARCHS", "")
    present = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    gpus = " ".join(re.findall(r"^\d+\.\d+$", present.stdout, re.MULTILINE)) if present.returncode == 0 else ""
    archs = []
    for item in re.split(r"[;,\s]+", (asked or gpus or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(f"LCCONFORMER_CUDA_ARCHS: cannot read {item!r}; write it like 8.0;9.0+PTX")
        arch = "".join(match.groups()[:3])
        if not (arch in known or (match[3] and builds(nvcc, arch))) or int(match[1]) < 8:
            if not asked:
                continue
            number = {k: int(re.sub(r"\D", "", k)) for k in known}
            usable = ", ".join(sorted((k for k in known if number[k] >= 80), key=lambda k: (number[k], k)))
            raise ValueError(f"LCCONFORMER_CUDA_ARCHS: CUDA {nvcc.version} cannot build {item}; it can build {usable}")
        if (arch + (match[4] or "")) not in archs:
            archs.append(arch + (match[4] or ""))
    return archs


def builds(nvcc: Nvcc, arch: str) -> bool:
    """Whether this nvcc takes ``arch``; its list leaves out the variants, like 90a and 100f."""
    nothing = ["-c", "-x", "cu", os.devnull, "-o", os.devnull]
    return run([nvcc.path, "--dryrun", *nothing, *gencode([arch])]).returncode == 0


def gencode(archs: Sequence[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags


def with_own_features(archs: Sequence[str]) -> list[str]:
    """``archs`` for a source that uses the features of sm_90a: 90a in the place of 90, whose devices run either.

    90+PTX stays beside it: newer devices compile its PTX.
    """
    own = ["90a" if arch == "90" else arch for arch in archs]
    return [*own, "90a"] if "90+PTX" in own and "90a" not in own else own


def max_jobs() -> int:
    """``MAX_JOBS``, else as many as cores and free memory carry."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise ValueError(f"MAX_JOBS is {asked!r}; expected a positive number")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // JOB_MEMORY))


def free_memory() -> int:
    """Bytes this process may still use, by the machine and by its control group."""
    free = [1 << 62]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (available := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free.append(int(available[1]) << 10)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return min(free)


def find_ninja() -> str:
    """The ninja of the pip package, else of PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
    else:
        path = os.path.join(ninja.BIN_DIR, "ninja")
    if path is None:
        raise FileNotFoundError("ninja is not installed; pip install ninja")
    return path


def simd_levels() -> dict[str, list[str]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return SIMD_LEVELS
    return {"generic": []}
