"""Result files: one JSON row per provider and case, written as soon as its case is finished."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lcconformer import __version__
from lcconformer.runtime import read_json, write_atomically

__all__ = ["Results", "Row", "add_row", "device_name", "versions"]


@dataclass(frozen=True)
class Row:
    """One measurement of one provider; None where a field does not apply or was not measured.

    Attributes:
        provider, backend: names in :data:`~lcconformer.bench.providers.registry.PROVIDERS`.
        mode, batch, frames, d_model, layers, depth, dtype, device: see :class:`~lcconformer.bench.core.case.Case`.
        device_name: name of the GPU, or of the CPU with its number of threads.
        versions: package -> version.
        commit: short hash; ``-dirty`` where the working tree had changes.
        median_ms, p20_ms, p80_ms: milliseconds of one call.
        tokens_per_s: frames of the whole batch per second.
        rtf: time over the duration of the audio, at 10 ms a frame.
        peak_memory_mb: peak memory of one call.
        tflops, gb_per_s, percent_of_roofline: by the minimum work of :mod:`~lcconformer.bench.core.roofline`.
        speedup_vs_eager: ratio of the medians of the same rounds.
        beside: what else ran on the cores, as ``--contention`` names it: a number of busy threads, or ``"torch"``; empty:
            nothing.
    """

    provider: str
    backend: str
    mode: str
    batch: int
    frames: int
    d_model: int
    layers: int
    depth: int
    dtype: str
    device: str
    device_name: str
    versions: dict[str, str]
    commit: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    tokens_per_s: float
    rtf: float | None
    peak_memory_mb: float | None
    tflops: float
    gb_per_s: float
    percent_of_roofline: float
    speedup_vs_eager: float | None
    beside: str = ""

    def key(self) -> tuple:
        """Identity of the measurement: rows with equal keys measured the same thing."""
        names = ("provider", "backend", "mode", "batch", "frames", "d_model", "layers", "depth", "dtype", "device_name")
        return (*(getattr(self, n) for n in names), self.commit, self.beside)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """Build a row from its JSON object.

        Raises:
            ValueError: fields are missing or unknown.
        """
        expected = {f.name for f in fields(cls)}
        wrong = ", ".join(sorted((expected ^ set(value)) - (expected & {"beside"})))  # older files lack it
        if wrong:
            raise ValueError(f"bench: a result row has missing or unknown fields: {wrong}")
        return cls(**value)


class Results:
    """Rows, the reasons why others are missing, and measured ceilings; saved to a file if one is named.

    Rows are added to a file that exists; a row replaces an older one with the same key.

    Args:
        path: the file, JSON.

    Raises:
        ValueError: the file exists and is no result file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.skipped: list[dict[str, str]] = []
        self.ceilings: dict[str, dict[str, float]] = {}
        now = datetime.datetime.now(datetime.timezone.utc)
        self.date = now.isoformat(timespec="minutes")  # when the file was begun
        self._told: set[tuple[str, str]] = set()
        if path is not None and path.exists():
            try:
                content = read_json(path)
                self.rows = [Row.from_json(row) for row in content["rows"]]
                self.skipped, self.ceilings = content["skipped"], content["ceilings"]
                self.date = content["date"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"bench: {path} is no result file of this suite ({error}); name another") from error

    def add(self, rows: list[Row]) -> None:
        new = {row.key() for row in rows}
        self.rows = [row for row in self.rows if row.key() not in new] + rows
        self.save()

    def skip(self, provider: str, case: str, reason: str) -> bool:
        """Note why a provider has no row; True the first time this reason is given in this run."""
        entry = {"provider": provider, "case": case, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)
            self.save()
        new = (provider, reason) not in self._told
        self._told.add((provider, reason))
        return new

    def save(self) -> None:
        if self.path is None:
            return
        content = {
            "date": self.date,
            "rows": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
            "ceilings": self.ceilings,
        }
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")


def add_row(path: Path, row: Any, identity: Sequence[str]) -> None:
    """Add a row, a dataclass, to a file of its kind, in place of one that agrees with it in the fields ``identity``."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    content = read_json(path) if path.exists() else {"date": now, "rows": []}
    new = asdict(row)
    kept = [old for old in content["rows"] if any(old[name] != new[name] for name in identity)]
    write_atomically(path, json.dumps({"date": content["date"], "rows": [*kept, new]}, indent=1) + "\n")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of everything that affects speed: package -> version."""
    found = {"python": platform.python_version(), "lcconformer": __version__, "torch": torch.__version__}
    for name in ("triton", "torchaudio", "transformers", "onnxruntime", "openvino"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
