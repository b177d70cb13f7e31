"""Launch configurations measured by `python -m lcconformer tune` on this GPU, in place of the heuristics.

One JSON file per GPU and version of Triton, in the folder LCCONFORMER_TUNED or ~/.cache/lcconformer/tuned, read when a kernel
is first launched on that GPU. A heuristic's choice or a shape is the key, the measured one the value; one that is not among
the candidates is not used, so whatever a file says, a kernel gets tiles that it was written for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from lcconformer.runtime import read_json, write_atomically

from .common import LaunchConfig

_log = logging.getLogger("lcconformer")
# while tuning: the candidates of every choice, and what to choose instead of the file's
_seen: dict[str, list[LaunchConfig]] | None = None
_forced: dict[str, LaunchConfig] = {}

Limits = Mapping[str, tuple[int, int]]
# what may be chosen in place of the heuristic's choice: its neighbours, with these tiles in limits; or those listed
Others = Limits | Sequence[LaunchConfig]


def folder() -> Path:
    """Return the folder of tuned configurations."""
    given = os.environ.get("LCCONFORMER_TUNED")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "lcconformer" / "tuned"


def file_of(gpu: str, where: Path | None = None) -> Path:
    """Return the file of a GPU, named as torch names it."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return (where or folder()) / f"{slug}-triton-{triton.__version__}.json"


def candidates(heuristic: LaunchConfig, others: Others) -> list[LaunchConfig]:
    """List the heuristic's choice first, then one tile halved or doubled within its limits, warps too, or other stages."""
    if not isinstance(others, Mapping):
        return [heuristic, *others]
    tiles = [heuristic.blocks]
    for name, (low, high) in others.items():
        size = heuristic.blocks[name]
        tiles += [{**heuristic.blocks, name: n} for n in (size // 2, 2 * size) if low <= n <= high]
    warps = [w for w in (heuristic.num_warps, heuristic.num_warps // 2, 2 * heuristic.num_warps) if 1 <= w <= 16]
    found = [LaunchConfig(w, heuristic.num_stages, blocks) for blocks in tiles for w in warps]
    stages = [s for s in (1, 2, 3) if s != heuristic.num_stages]
    return found + [LaunchConfig(heuristic.num_warps, s, heuristic.blocks) for s in stages]


def tuned(kernel: str, x: torch.Tensor, heuristic: LaunchConfig, others: Others, shape: str = "") -> LaunchConfig:
    """The configuration to launch `kernel` with on tensors like `x`, by what the heuristic chooses for them, or by `shape`."""
    table = _table(_gpu(x.device.index)) if x.device.type == "cuda" else {}
    if not table and _seen is None:
        return heuristic
    key = f"{kernel} {str(x.dtype)[6:]} {shape or heuristic}"
    if _seen is not None:
        _seen[key] = candidates(heuristic, others)
    found = _forced.get(key) or table.get(key, heuristic)
    return found if found == heuristic or found in candidates(heuristic, others) else heuristic


@contextlib.contextmanager
def watched() -> Iterator[tuple[dict[str, list[LaunchConfig]], dict[str, LaunchConfig]]]:
    """(key -> candidates of what is launched inside, key -> the one to use: to be filled by the caller)."""
    global _seen
    _seen = {}
    try:
        yield _seen, _forced
    finally:
        _seen = None
        _forced.clear()


def write(path: Path, gpu: str, table: Mapping[str, LaunchConfig]) -> None:
    """Write the table of a GPU atomically."""
    entries = {k: {"num_warps": c.num_warps, "num_stages": c.num_stages, **c.blocks} for k, c in sorted(table.items())}
    write_atomically(path, json.dumps({"gpu": gpu, "triton": triton.__version__, "configs": entries}, indent=1) + "\n")
    _table.cache_clear()


def read(path: Path) -> dict[str, LaunchConfig]:
    """Read a table that `write` wrote.

    Raises:
        ValueError: the file is something else; it is named.
    """
    try:
        return {key: _config(entry) for key, entry in read_json(path)["configs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no tuned configurations ({error!r}); delete it, or run python -m lcconformer tune"
        ) from error


def _config(entry: dict[str, Any]) -> LaunchConfig:
    if not all(isinstance(v, int) for v in entry.values()):
        raise ValueError(f"{entry} has values that are not integers")
    blocks = {k: v for k, v in entry.items() if k not in ("num_warps", "num_stages")}
    return LaunchConfig(entry["num_warps"], entry["num_stages"], blocks)


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _table(gpu: str) -> dict[str, LaunchConfig]:
    path = file_of(gpu)
    if not path.exists():
        return {}
    try:
        return read(path)
    except (ValueError, OSError) as error:
        _log.warning("%s; the heuristics choose", error)
        return {}
