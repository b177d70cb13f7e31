"""The program that measures a phase of the cluster-resident loop, emulated: its numbers, under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess

import pytest

from .building import ROOT, SANITIZE, build


@pytest.mark.parametrize("seed", range(2))
def test_numbers(gxx, seed):
    program = build("cluster_phases", [(ROOT / "bench/gpu/cluster_phases.cu", SANITIZE)], [], gxx)
    done = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    name, error = done.stdout.split()
    assert name == "relative_error"
    assert 0 < float(error) < 0.01
