"""Result files: JSON with the description of the machine, and pages in HTML."""

from __future__ import annotations

import datetime
import html
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...runtime import write_atomically

__all__ = ["describe_machine", "html_document", "write_json"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th[colspan] { text-align: center; } thead th { border-bottom: 2px solid #555; }
img { max-width: 100%; height: auto; } code { font-size: .9em; }
.note { color: #444; font-size: .92rem; } .warning { border-left: 4px solid #D55E00; padding-left: .8rem; }
"""


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, are an error."""
    return write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def html_document(title: str, body: str) -> str:
    """A whole page with the style of the reports, which needs no other file.

    Args:
        title: plain text.
        body: HTML; paragraphs of the classes ``note`` and ``warning`` are set apart.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


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
