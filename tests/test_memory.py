"""No reader takes a gigabyte for a file of under 100 MB, whatever the file says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_MB = 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_files_that_were_made_to_fill_the_memory(tmp_path: Path) -> None:
    program = Path(__file__).with_name("hostile_files.py")
    done = subprocess.run([sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(lines) > 20
    too_much = [f"{name}: {peak} MB ({outcome})" for name, peak, outcome in lines if int(peak) >= LIMIT_MB]
    assert not too_much, "\n".join(too_much)
