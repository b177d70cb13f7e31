"""Neighbours are there, busy, while the block runs, and gone after it."""

import os
import time
from pathlib import Path

import pytest
from lcconformer.bench.core.contention import neighbours, parse_contention


def test_what_the_option_takes():
    assert (parse_contention("3"), parse_contention("torch")) == (3, None)
    for text in ("0", "-1", "1.5", "eager", ""):
        with pytest.raises(ValueError, match="expected a number of busy threads"):
            parse_contention(text)


def children() -> dict[str, int]:
    """Ticks of processor time of each child of this process that runs."""
    fields = [
        p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if os.access(p, os.R_OK)
    ]
    return {f"{i}": int(f[11]) for i, f in enumerate(fields) if f[1] == str(os.getpid()) and f[0] != "Z"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes as Linux lists them")
@pytest.mark.parametrize(("busy", "processes"), [(2, 2), (None, 1)])
def test_neighbours_are_busy_inside_the_block(busy, processes):
    before = len(children())
    with neighbours(busy, 1):
        assert len(children()) == before + processes
        begin, ticks = time.monotonic(), sum(children().values())
        while sum(children().values()) < ticks + 5:
            assert time.monotonic() < begin + 60, "the neighbours rest"
            time.sleep(0.05)
    assert len(children()) == before
