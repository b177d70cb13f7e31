"""Checkpoints: one safetensors file each, with the tensors in its body and everything else as JSON in its header.

Files are replaced atomically: a killed process leaves either the old content or the new.  Loading executes no code.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..runtime import replacing

__all__ = ["Checkpoint", "checkpoint_path", "find_checkpoints", "load_checkpoint", "save_checkpoint"]

_KEY = "lcconformer"
_FORMAT = 1
_NAME = re.compile(r"step_(\d+)\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    path: the file it was read from. tensors: named ``model.*`` and ``optimizer.*``, on the CPU. meta: the JSON of the header:
    ``config``, ``features``, ``objective``, ``settings``, ``step`` (steps done), ``epoch``, ``position``, ``version``, ...
    """

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, under their names without it."""
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}


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
    """Write ``tensors`` and ``meta`` (anything that JSON can hold) atomically; returns the path."""
    from safetensors.torch import save_file

    path = Path(path)
    header = json.dumps({**meta, "format": _FORMAT, "version": __version__}, allow_nan=False)
    with replacing(path) as temporary:
        save_file({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, temporary, metadata={_KEY: header})
    return path


def load_checkpoint(path: str | os.PathLike[str], *, prefix: str | None = "") -> Checkpoint:
    """Read a checkpoint file, or the newest checkpoint in the folder of a run.

    Args:
        path: the file or folder.
        prefix: read only the tensors whose name starts with this (``"model."`` leaves out the optimizer); None: no tensors.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
        ValueError: the file is truncated, no checkpoint of this package, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        found = find_checkpoints(path)
        if not found:
            raise FileNotFoundError(f"no checkpoint in {path}: expected files like {checkpoint_path('', 500).name}")
        path = found[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give a .safetensors file or the folder of a run")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            names = [] if prefix is None else [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names} if header is not None else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no checkpoint, or a damaged one ({error}): expected a complete .safetensors file written by "
            "'lcconformer pretrain'; take an older one of the run"
        ) from error
    if header is None:
        raise ValueError(
            f"{path} is a safetensors file but no checkpoint of lcconformer: its header has no {_KEY!r} entry; "
            "expected a file written by 'lcconformer pretrain'"
        )
    try:
        meta = json.loads(header)
        form = meta["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): take an older checkpoint of the run") from error
    if form != _FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {form!r}, written by lcconformer {meta.get('version')}; this is lcconformer "
            f"{__version__}, which reads format {_FORMAT}: install the version that wrote it"
        )
    return Checkpoint(path, tensors, meta)
