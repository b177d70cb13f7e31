"""Builds ``lcconformer._C`` from csrc/ with pybind11 and ninja; everything else is declared in pyproject.toml.

``pip install .`` compiles what this machine can compile and never fails for what it cannot:
no C++ compiler: a pure Python package; no nvcc, or CUDA code that does not compile: the CPU part. One line says so.

LCCONFORMER_CUDA        1: CUDA or an error (nvcc comes from pip if the machine has none); 0: no CUDA; unset: if it works
LCCONFORMER_CUDA_ARCHS  as in 8.0;9.0+PTX; unset: the GPU of this machine, or a list for all from sm_80 up
MAX_JOBS                parallel compilers; unset: by cores and free memory
CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDA_HOME, NVCC_APPEND_FLAGS as usual
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC))  # build isolation leaves the project itself off the path
import toolchain  # noqa: E402

CUDA_SWITCH = os.environ.get("LCCONFORMER_CUDA", "")
GET_CUDA = "LCCONFORMER_CUDA=1 pip install . builds the CUDA kernels with an nvcc from pip"


def say(message: str) -> None:
    print(f"lcconformer: {message}", file=sys.stderr, flush=True)


class BuildFailed(RuntimeError):
    """ninja stopped; the compiler's message is in the text."""


class NinjaFile:
    """A build.ninja that compiles ``csrc`` into one module."""

    def __init__(self, compiler: toolchain.Compiler, nvcc: toolchain.Nvcc | None, archs: list[str], note: str):
        import pybind11

        includes = [f"-I{CSRC}", "-I.", f"-isystem{pybind11.get_include()}"]
        includes.append(f"-isystem{sysconfig.get_paths()['include']}")
        openmp = ["-fopenmp"] if compiler.openmp else []
        # no -ffast-math: NaN and infinity keep their meaning, and sums their order
        self.cxx_flags = [
            *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
            *("-Wall", "-Wextra", *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))),
        ]
        self.compiler, self.nvcc, self.archs, self.note = compiler, nvcc, archs, note
        self.includes = includes
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.link_flags = [*shared, *openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.link_libs: list[str] = []
        self.nvcc_flags: list[str] = []
        if nvcc is not None:
            own = toolchain.with_own_features(archs)
            self.nvcc_flags = [
                *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", "-lineinfo"),
                f"-ccbin={compiler.command[0]}",
                *(["-DLCC_SM90A=1"] if any(arch.startswith("90a") for arch in own) else []),
            ]
            self.code = {False: toolchain.gencode(archs), True: toolchain.gencode(own)}
            self.includes = [*includes, *(f"-isystem{p}" for p in nvcc.include_dirs())]
            self.link_libs = [str(nvcc.cudart_static()), "-ldl", "-lrt", "-lpthread"]
            self.cxx_flags.append("-DLCC_CUDA=1")

    def info(self, version: str) -> dict[str, object]:
        cuda = None
        if self.nvcc is not None:
            cuda = {"version": self.nvcc.version, "archs": self.archs, "flags": self.nvcc_flags[:2]}
        return {
            "version": version,
            "compiler": self.compiler.version,
            "flags": self.cxx_flags,
            "openmp": self.compiler.openmp,
            "simd": list(toolchain.simd_levels()),
            "cuda": cuda,
            "cuda_note": self.note,
        }

    def write(self, folder: Path, version: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(
            folder / "build_info.h", f'#define LCC_BUILD_INFO R"json({json.dumps(self.info(version))})json"\n'
        )
        compile_line = shlex.join([*self.compiler.command, "-MMD", "-MF", "$out.d", *self.includes])
        lines = [
            "rule cxx",
            f"  command = {unquote(compile_line)} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join(self.compiler.command)} $in -o $out $flags",
        ]
        if self.nvcc is not None:
            nvcc_line = shlex.join([self.nvcc.path, "-MD", "-MF", "$out.d", f"-I{CSRC}", *self.nvcc_flags])
            lines += [
                "rule nvcc",
                f"  command = {unquote(nvcc_line)} $flags -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects = []

        def add(rule: str, source: Path, suffix: str = "", extra: Sequence[str] = ()) -> None:
            name = "_".join(source.relative_to(CSRC).parts) + suffix + ".o"
            lines.append(f"build {name}: {rule} {ninja_path(source)}")
            flags = self.cxx_flags if rule == "cxx" else []
            lines.append(f"  flags = {shlex.join([*flags, *extra])}")
            objects.append(name)

        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
            add("cxx", source)
        for source in sorted(CSRC.glob("cpu/simd/*.cpp")):
            for level, flags in toolchain.simd_levels().items():
                add("cxx", source, f".{level}", (f"-DLCC_SIMD={level}", *flags))
        if self.nvcc is not None:
            for source in sorted(CSRC.glob("cuda/*.cpp")):
                add("cxx", source)
            for source in sorted(CSRC.glob("cuda/*.cu")):
                add("nvcc", source, extra=self.code[source in toolchain.OF_90A])
        lines.append(f"build _C.so: link {' '.join(objects)}")
        lines.append(f"  flags = {shlex.join([*self.link_flags, *self.link_libs])}")
        write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def unquote(line: str) -> str:
    return line.replace("'$out.d'", "$out.d")


def write_if_changed(path: Path, text: str) -> None:
    """An untouched file keeps its date, and ninja its objects."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        compiler = toolchain.find_compiler()
        if isinstance(compiler, str):
            if CUDA_SWITCH == "1":
                raise BuildFailed(f"LCCONFORMER_CUDA=1, but {compiler}")
            say(f"{compiler}: installing without the compiled extension (PyTorch and Triton still serve every op)")
            # a module of an earlier build would not fit these sources
            for stale in (target, ROOT / self.get_ext_filename(ext.name)):
                stale.unlink(missing_ok=True)
            return
        nvcc = "switched off by LCCONFORMER_CUDA=0" if CUDA_SWITCH == "0" else toolchain.find_nvcc()
        if isinstance(nvcc, str):
            if CUDA_SWITCH == "1":
                raise BuildFailed(f"LCCONFORMER_CUDA=1, but {nvcc}; pip install {' '.join(toolchain.CUDA_PACKAGES)}")
            if CUDA_SWITCH != "0":
                say(f"no CUDA kernels: {nvcc}. {GET_CUDA}")
            self.compile(compiler, None, [], nvcc, target)
            return
        try:
            self.compile(compiler, nvcc, toolchain.architectures(nvcc), "", target)
        except BuildFailed as error:
            if CUDA_SWITCH == "1":
                raise
            say(str(error))
            say(f"the CUDA kernels did not compile with {nvcc.path} (message above): building the CPU part only")
            self.compile(compiler, None, [], f"did not compile: {toolchain.first_error(str(error))}", target)

    def compile(self, compiler, nvcc, archs, note, target: Path) -> None:
        folder = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        NinjaFile(compiler, nvcc, archs, note).write(folder, self.distribution.get_version())
        jobs = toolchain.max_jobs()
        built = f"CPU and CUDA {nvcc.version} ({' '.join(archs)})" if nvcc else "CPU"
        say(f"building {built} with {compiler.version}, {jobs} jobs")
        ninja = subprocess.run([toolchain.find_ninja(), f"-j{jobs}"], cwd=folder, capture_output=True, text=True)
        if ninja.returncode:
            raise BuildFailed(ninja.stdout + ninja.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "_C.so"), str(target))


def cuda_from_pip() -> list[str]:
    """What an isolated build must fetch first: nvcc, where CUDA is demanded and the machine has none."""
    return list(toolchain.CUDA_PACKAGES) if CUDA_SWITCH == "1" and isinstance(toolchain.find_nvcc(), str) else []


if CUDA_SWITCH not in ("", "0", "1"):
    raise SystemExit(f"LCCONFORMER_CUDA is {CUDA_SWITCH!r}; expected 0 or 1, or leave it unset")
setup(
    # optional: setuptools accepts that it was not built; every error of our own still stops the build
    ext_modules=[Extension("lcconformer._C", ["csrc/bindings.cpp"], optional=True)],
    cmdclass={"build_ext": BuildExtension},
    setup_requires=cuda_from_pip(),
)
