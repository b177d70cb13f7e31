"""Result files: JSON, and the description of the machine that goes into them."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...runtime import write_atomically

__all__ = ["describe_machine", "write_json"]


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, are an error."""
    return write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe where numbers were measured: device, processor, threads, versions, date (UTC)."""
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
