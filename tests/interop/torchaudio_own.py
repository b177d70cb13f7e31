"""Run torchaudio's own tests of what contains a Conformer: as it is, and with ours in its place.

``python tests/interop/torchaudio_own.py CHECKOUT --out FILE``, where CHECKOUT is a checkout of pytorch/audio that still has
``torchaudio/prototype`` (up to 2.8): the RNN-T there is built from the Conformer of the installed torchaudio, which must be
importable.  Needs ``parameterized`` and ``expecttest``.  The exit status is 0 if all that pass on torchaudio's own pass
the other time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

FILES = (
    "models/conformer/conformer_cpu_test.py",
    "prototype/rnnt_cpu_test.py",
)
WAYS = ("original", "ours")
LIMIT = 120  # seconds of one test


class Recorder:
    """A plugin of pytest that keeps outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.rpartition("/")[2]
        self.outcomes[name] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()
            self.errors[name] = next((line for line in lines if line.strip()), "")[:300]


def _tools() -> types.ModuleType:
    """What the tests take from ``torchaudio_unittest.common_utils``, which needs more of torchaudio than is left of it."""
    import unittest

    import torch
    from parameterized import parameterized
    from torch.testing._internal.common_utils import TestCase

    class TestBaseMixin:
        def setUp(self) -> None:
            super().setUp()  # type: ignore[misc]
            torch.manual_seed(2434)

    def torch_script(module: Any) -> Any:
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)

    def nested_params(first: list[Any], second: list[Any]) -> Any:
        return parameterized.expand([(a, b) for a in first for b in second])

    tools: Any = types.ModuleType("torchaudio_unittest.common_utils")
    tools.TestBaseMixin, tools.PytorchTestCase, tools.torch_script = TestBaseMixin, TestCase, torch_script
    tools.TorchaudioTestCase = type("TorchaudioTestCase", (TestBaseMixin, TestCase), {})
    tools.nested_params = nested_params
    tools.disabledInCI = tools.skipIfNoCuda = unittest.skip("CUDA")
    return tools


def run_one(way: str, checkout: Path, out: Path) -> None:
    """Run the tests in this process."""
    import pytest
    import torchaudio

    import lcconformer

    if way == "ours":
        torchaudio.models.Conformer = lcconformer.Conformer
    torchaudio.__path__.append(str(checkout / "torchaudio"))
    sys.path.insert(0, str(checkout / "test"))
    sys.modules["torchaudio_unittest.common_utils"] = _tools()
    recorder = Recorder()
    options = [
        "-q",
        "-c",
        os.devnull,
        f"--rootdir={checkout}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
    ]
    options += ["--import-mode=importlib", f"--timeout={LIMIT}", "-o", "timeout_method=signal", "-k", "not cuda"]
    pytest.main([*options, *(str(checkout / "test" / "torchaudio_unittest" / f) for f in FILES)], plugins=[recorder])
    out.write_text(json.dumps({"outcomes": recorder.outcomes, "errors": recorder.errors}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_one(args.way, args.checkout.resolve(), args.out)
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            part = Path(folder, f"{way}.json")
            command = [sys.executable, __file__, str(args.checkout), "--out", str(part), "--way", way]
            subprocess.run(command, check=True)
            found[way] = json.loads(part.read_text())
    passed = {way: [n for n, o in x["outcomes"].items() if o == "passed"] for way, x in found.items()}
    lost = {
        way: {n: found[way]["errors"].get(n, "not found") for n in passed["original"] if n not in passed[way]}
        for way in WAYS[1:]
    }
    content = {
        "torchaudio": importlib.metadata.version("torchaudio"),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "passed": {way: len(names) for way, names in passed.items()},
        "of": len(found["original"]["outcomes"]),
        "pass on the original alone": lost,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))
    return 1 if any(lost.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
