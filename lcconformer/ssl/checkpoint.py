"""Checkpoints: one safetensors file each, with the tensors in its body and everything else as JSON in its header.

Files are replaced atomically: a killed process leaves either the old content or the new.  Loading executes no code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..tensor_files import Entry, differences, read_header, read_tensors, write_tensors

__all__ = ["Checkpoint", "checkpoint_path", "find_checkpoints", "load_checkpoint", "save_checkpoint"]

_KEY = "lcconformer"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{1,18})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    path: the file it was read from. tensors: named ``model.*`` and ``optimizer.*``, on the CPU. meta: the JSON of the header:
    ``config``, ``features``, ``objective``, ``settings``, ``step`` (steps done), ``epoch``, ``position``, ``version``, ...
    entries: dtype and shape of every tensor of the file, those too that were not read.
    """

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    entries: Mapping[str, Entry]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, under their names without it."""
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}

    def check(self, prefix: str, expected: Mapping[str, Tensor]) -> None:
        """Compare the tensors under ``prefix`` with ``expected`` (on the meta device, say): names, shapes, dtypes, values.

        Raises:
            ValueError: they differ, or a value that was read is not finite; the message names up to three tensors.
        """
        found = {name[len(prefix) :]: entry for name, entry in self.entries.items() if name.startswith(prefix)}
        wrong = differences(found, expected)
        for name, x in self.section(prefix).items():
            if name in expected and x.is_floating_point() and not x.isfinite().all():
                wrong.append(f"{name} has values that are not finite")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{self.path} does not fit its own settings: {'; '.join(wrong[:3])}{more}")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Path of the checkpoint after ``step`` steps."""
    return Path(folder) / f"step_{step:08d}.safetensors"


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints in the folder of a run, oldest first; none if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write ``tensors`` and ``meta`` (anything that JSON can hold) atomically; returns the path.

    Raises:
        OSError: it cannot be written; there is no room on the disk, say.
        ValueError: JSON cannot hold ``meta``, or it is too large for the header of a file.
    """
    header = json.dumps({**meta, "format": _FORMAT, "version": __version__}, allow_nan=False)
    return write_tensors(path, tensors, {_KEY: header})


def load_checkpoint(path: str | os.PathLike[str], *, prefix: str | None = "") -> Checkpoint:
    """Read a checkpoint file, or the newest checkpoint in the folder of a run.

    Args:
        path: the file or folder.
        prefix: read only the tensors whose name starts with this (``"model."`` leaves out the optimizer); None: no tensors.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
        ValueError: the file is truncated, no checkpoint of this package, or of another format.
    """
    path = Path(path)
    if path.is_dir():
        found = find_checkpoints(path)
        if not found:
            raise FileNotFoundError(f"no checkpoint in {path}: expected files like {checkpoint_path('', 500).name}")
        path = found[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give a .safetensors file or the folder of a run")
    try:
        header = read_header(path)
        text = header.texts.get(_KEY)
        names = [] if prefix is None or text is None else [name for name in header.tensors if name.startswith(prefix)]
        tensors = read_tensors(path, names)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no checkpoint, or a damaged one ({error}): expected a complete .safetensors file written by "
            "'lcconformer pretrain'; take an older one of the run"
        ) from error
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file but no checkpoint of lcconformer: its header has no {_KEY!r} entry; "
            "expected a file written by 'lcconformer pretrain'"
        )
    try:
        meta = json.loads(text)
        form = meta["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): take an older checkpoint of the run") from error
    if form != _FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {form!r:.60}, written by lcconformer {meta.get('version')!s:.60}; this is "
            f"lcconformer {__version__}, which reads format {_FORMAT}: install the version that wrote it"
        )
    return Checkpoint(path, tensors, meta, header.tensors)
