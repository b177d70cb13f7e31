"""The compiled module ``lcconformer._C``: found once, never compiled here, and explained where it is missing.

The module uses OpenMP. PyTorch brings a ``libgomp.so.1`` of its own; PyTorch is imported first, so that the loader
finds that name taken and both share one runtime, one pool of threads, and ``torch.set_num_threads``.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (before the extension: see above)

INTERFACE = 11  # kInterface of csrc/arguments.h: names and fields of the kernels as this source calls them

__all__ = ["INTERFACE", "build_info", "cuda_reasons", "load", "openmp_runtimes", "why_missing"]

REBUILD = "reinstall lcconformer from source with a C++ compiler on PATH (pip install --force-reinstall --no-deps .)"


@functools.cache
def _attempt() -> ModuleType | str:
    name = f"{__package__}._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        folder = Path(__file__).parent
        others = sorted(p.name for p in folder.glob("_C.*.so"))
        if others:
            return f"lcconformer._C was built for another Python ({', '.join(others)}); {REBUILD}"
        return f"lcconformer._C was not built when lcconformer was installed; {REBUILD}"
    except ImportError as error:  # an undefined symbol, a missing shared library, a file of another machine
        return f"lcconformer._C does not load: {error}; {REBUILD}"
    interface = getattr(module, "interface", 1)
    if interface != INTERFACE:
        return f"lcconformer._C has interface {interface}, and this source calls interface {INTERFACE}; {REBUILD}"
    return module


def load() -> ModuleType:
    """The module.

    Raises:
        ImportError: it was not built, or does not load; the message says which and what to do.
    """
    module = _attempt()
    if isinstance(module, str):
        raise ImportError(module, name=f"{__package__}._C")
    return module


def why_missing() -> str | None:
    """Why the module cannot be used, or None if it can."""
    module = _attempt()
    return module if isinstance(module, str) else None


def build_info() -> dict[str, Any]:
    """What was built: version, compiler, flags, openmp, simd levels, cuda (version, archs, flags; or None and why).

    Raises:
        ImportError: as ``load``.
    """
    return json.loads(load().build_info)


@functools.cache
def cuda_reasons(capability: int) -> list[str]:
    """Reasons against the CUDA kernels on a device of that compute capability (90 for 9.0); empty: they run."""
    missing = why_missing()
    if missing is not None:
        return [missing]
    info = build_info()
    if info["cuda"] is None:
        return [f"lcconformer was built without CUDA kernels ({info['cuda_note']})"]
    archs: list[str] = info["cuda"]["archs"]
    if any(_serves(arch, capability) for arch in archs):
        return []
    return [
        f"the CUDA kernels were built for {', '.join(archs)} and this device is sm_{capability}; "
        f"rebuild with LCCONFORMER_CUDA_ARCHS={capability // 10}.{capability % 10}"
    ]


def _serves(arch: str, capability: int) -> bool:
    """Machine code runs on later minor versions of its major one; PTX on everything later; 90a on 9.0 alone."""
    match = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        raise ValueError(f"build info lists the architecture {arch!r}; expected one like 90, 90a, 90+PTX")
    built, only, ptx = int(match[1]), match[2], match[3]
    if only == "a":
        return built == capability
    return built <= capability and (built // 10 == capability // 10 or (ptx is not None and not only))


def openmp_runtimes() -> list[str]:
    """OpenMP libraries mapped into this process (Linux); more than one means two pools of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(f for f in files if re.match(r"lib(gomp|iomp5|omp)[-.]", Path(f).name))
