"""What commands leave behind: JSON files, and a description of the machine they ran on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__

__all__ = ["add_device_argument", "describe_machine", "progress_bar", "write_atomically", "write_json"]


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[float], None]]:
    """A bar on the standard error, driven by calls with the part done, 0 to 1.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('the progress bar needs tqdm: pip install "lcconformer[speech]"') from error
    form = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}"
    with tqdm(total=1.0, desc=name, bar_format=form, dynamic_ncols=True) as bar:
        yield lambda part: bar.update(part - bar.n)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file so that it is there whole or not at all; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON; NaN and infinity are an error, JSON has neither."""
    return write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``, checked when the arguments are parsed."""

    def device(text: str) -> torch.device:
        try:
            chosen = torch.device(text)
        except RuntimeError:
            chosen = None
        if chosen is None or chosen.type not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu, cuda or cuda:N")
        if chosen.type == "cuda" and not (chosen.index or 0) < torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text!r} is not there: {torch.cuda.device_count()} CUDA devices; try cpu"
            )
        return chosen

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help=f"cpu, cuda or cuda:N (default {default})")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a number was measured: device, processor, threads, versions, date (UTC)."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lcconformer": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
