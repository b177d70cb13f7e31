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
from ..runtime import replacing

__all__ = ["Checkpoint", "checkpoint_path", "find_checkpoints", "load_checkpoint", "save_checkpoint"]

_KEY = "lcconformer"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{1,18})\.safetensors")
_LARGEST_HEADER = 1 << 24  # characters of JSON; what we write has a few thousand


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    path: the file it was read from. tensors: named ``model.*`` and ``optimizer.*``, on the CPU. meta: the JSON of the header:
    ``config``, ``features``, ``objective``, ``settings``, ``step`` (steps done), ``epoch``, ``position``, ``version``, ...
    shapes: the shape of every tensor of the file, those too that were not read.
    """

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, under their names without it."""
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}

    def check(self, prefix: str, expected: Mapping[str, Tensor]) -> None:
        """Compare the tensors under ``prefix`` with ``expected`` (on the meta device, say): names, shapes, dtypes, values.

        Raises:
            ValueError: they differ, or a value that was read is not finite; the message names up to three tensors.
        """
        found = {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        wrong = [f"{name} is missing" for name in expected if name not in found]
        wrong += [f"{name} is not part of it" for name in found if name not in expected]
        for name, like in expected.items():
            if name in found and found[name] != tuple(like.shape):
                wrong.append(f"{name} has shape {list(found[name])}, not {list(like.shape)}")
        for name, x in self.section(prefix).items():
            if name in expected and x.is_floating_point() != expected[name].is_floating_point():
                wrong.append(f"{name} has dtype {x.dtype}, not {expected[name].dtype}")
            elif x.is_floating_point() and not x.isfinite().all():
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
        ValueError: JSON cannot hold ``meta``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    header = json.dumps({**meta, "format": _FORMAT, "version": __version__}, allow_nan=False)
    with replacing(path) as temporary:
        try:
            save_file(
                {k: x.detach().cpu().contiguous() for k, x in tensors.items()}, temporary, metadata={_KEY: header}
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
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
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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
        if len(header) > _LARGEST_HEADER:
            raise ValueError(f"it has {len(header)} characters; expected at most {_LARGEST_HEADER}")
        meta = json.loads(header)
        form = meta["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): take an older checkpoint of the run") from error
    if form != _FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {form!r}, written by lcconformer {meta.get('version')}; this is lcconformer "
            f"{__version__}, which reads format {_FORMAT}: install the version that wrote it"
        )
    return Checkpoint(path, tensors, meta, shapes)
