"""Safetensors files: written atomically, and refused by what their header says before memory is taken for them.

A file is 8 bytes with the size of its header, the header (JSON: dtype, shape and place of each tensor, and texts), and the
tensors.  All memory that reading takes is bounded: for the header by the cap on its size, for the tensors by the file's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runtime import replacing
from .validation import is_integer

__all__ = ["Entry", "Header", "differences", "read_header", "read_tensors", "write_tensors"]

LARGEST_HEADER = 1 << 23
"""Bytes of a header; 100 bytes a tensor, so that it serves encoders of hundreds of layers.  Reading takes 50 times as much."""
_MOST_DIMENSIONS = 16

# narrower floats have no arithmetic, and unsigned and complex numbers are nothing that a module of ours holds
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """A tensor of a file, as its header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of a file: its texts by key, and its tensors by name."""

    texts: Mapping[str, str]
    tensors: Mapping[str, Entry]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a file.

    Raises:
        ValueError: the file is no safetensors file, a truncated or damaged one, or has a dtype that is not read; the message
            does not name the file.
        OSError: it cannot be read.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {len(start)} bytes, which is no safetensors file")
        length = int.from_bytes(start, "little")
        if length > size - 8:
            raise ValueError(f"its header should have {length} bytes, more than the file, which has {size}")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header has {length} bytes; expected at most {LARGEST_HEADER}")
        text = file.read(length)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    texts = values.pop("__metadata__", {}) if isinstance(values, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(x, str) for x in texts.values()):
        raise ValueError("its header is no object of tensors and texts")
    return Header(texts, {name: _entry(name, value, size - 8 - length) for name, value in values.items()})


def _entry(name: str, value: Any, body: int) -> Entry:
    """Check what a header says of a tensor, whose place is within ``body`` bytes."""
    if not isinstance(value, dict):
        raise ValueError(f"its header describes tensor {name!r:.60} by a JSON {type(value).__name__}")
    dtype, shape, place = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r:.60} has dtype {dtype!r:.20}; expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(is_integer(n) and n >= 0 for n in shape):
        raise ValueError(f"tensor {name!r:.60} has shape {shape!r:.60}; expected at most {_MOST_DIMENSIONS} sizes")
    if not isinstance(place, list) or len(place) != 2 or not all(map(is_integer, place)):
        raise ValueError(f"tensor {name!r:.60} has data_offsets {place!r:.60}; expected begin and end")
    begin, end = place
    if not 0 <= begin <= end <= body:
        raise ValueError(
            f"tensor {name!r:.60} is at bytes {begin} to {end} of {body}: the file is truncated or damaged"
        )
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name!r:.60} has {end - begin} bytes, which is not its shape {shape} in {dtype}")
    return Entry(_DTYPES[dtype], tuple(shape))


def read_tensors(path: str | os.PathLike[str], names: Collection[str]) -> dict[str, Tensor]:
    """Read tensors of a file whose header :func:`read_header` has checked, into memory of their own on the CPU.

    Raises:
        ValueError: the file is damaged; the message does not name it.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            # what safetensors returns is not aligned as memory of PyTorch is
            return {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> Path:
    """Write tensors, and texts by key, atomically; returns the path.

    Raises:
        OSError: the file cannot be written; there is no room on the disk, say.
        ValueError: the header would be larger than :func:`read_header` accepts.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # as long as safetensors makes it, or a little longer: what it knows of a tensor takes at most 150 characters
    header = len(json.dumps([dict(texts), [*held]], ensure_ascii=False).encode()) + 150 * len(held)
    if header > LARGEST_HEADER:
        raise ValueError(
            f"{path} would need a header of {header} bytes for {len(held)} tensors and {len(texts)} texts; expected at most "
            f"{LARGEST_HEADER}: save fewer tensors to a file"
        )
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata=dict(texts))
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return path


def differences(found: Mapping[str, Entry], expected: Mapping[str, Tensor]) -> list[str]:
    """Say how the tensors of a file differ from ``expected`` (on the meta device, say): names, shapes, kinds of numbers.

    Floating-point numbers may have any precision; all others must have the dtype that is expected.
    """
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name:.100} is not part of it" for name in found if name not in expected]
    for name, like in expected.items():
        if name not in found:
            continue
        dtype, shape = found[name]
        if shape != tuple(like.shape):
            wrong.append(f"{name} has shape {list(shape)}, not {list(like.shape)}")
        elif dtype != like.dtype and not (dtype.is_floating_point and like.dtype.is_floating_point):
            wrong.append(f"{name} has dtype {dtype}, not {like.dtype}")
    return wrong
