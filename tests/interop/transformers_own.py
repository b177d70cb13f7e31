"""Run transformers' own model tests on its Conformers, as they are and accelerated, and compare what passes.

``python tests/interop/transformers_own.py CHECKOUT --out FILE [--model NAME ...]``, where CHECKOUT holds the ``tests`` of
the installed transformers: a git checkout, or the sdist (which has the common tests) over one.  Needs ``parameterized``.

Every model that a test makes is accelerated as its constructor ends, so that ``from_pretrained``, ``save_pretrained``,
copies and exports meet accelerated layers.  Inputs are drawn from the same seeds both times.  The exit status is 0 if each
test that passes on the original passes on the accelerated model, or is one of ``EXCEPTIONS``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# model -> its tests, as -k of pytest takes them: the text models of SeamlessM4T have no Conformer, and every Parakeet has
# the encoder of the one with CTC
MODELS = {
    "wav2vec2_conformer": "",
    "parakeet": "Encoder or CTC",
    "wav2vec2_bert": "",
    "seamless_m4t": "SpeechInput",
    "seamless_m4t_v2": "SpeechInput",
}
COMMON = ("test_modeling_common.py", "generation/test_utils.py")
# depthwise convolutions in float16 may not return on a CPU (PyTorch 2.13)
LEFT_OUT = "not fp16 and not float16 and not half"
LIMIT = 600  # seconds of one test
EXCEPTIONS: dict[str, str] = {}
"""Tests that may fail on an accelerated model alone, by name without class and parameters, and why."""


class Recorder:
    """A plugin of pytest: seeds each test, accelerates what it makes if asked to, and keeps outcomes."""

    def __init__(self, *, accelerated: bool) -> None:
        self.accelerated = accelerated
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.served = 0  # calls of layers that our kernels computed, in the test that runs

    def pytest_sessionstart(self) -> None:
        if not self.accelerated:
            return
        from transformers import PreTrainedModel

        import lcconformer
        from lcconformer.interop.accelerated import AcceleratedLayer

        post_init, run = PreTrainedModel.post_init, AcceleratedLayer.run

        def post_init_and_accelerate(model: Any) -> None:
            post_init(model)
            lcconformer.accelerate(model)

        def run_and_count(layer: Any, *args: Any) -> Any:
            self.served += 1
            return run(layer, *args)

        PreTrainedModel.post_init = post_init_and_accelerate
        AcceleratedLayer.run = run_and_count  # type: ignore[method-assign]

    def pytest_runtest_setup(self, item: Any) -> None:
        import numpy as np
        import torch

        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        common = sys.modules.get("tests.test_modeling_common")
        if common is not None:
            common.global_rng.seed(0)
        self.served = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        # of setup, call, subtests and teardown the worst counts; one that was skipped or failed early has no call
        if report.when != "call" and report.passed:
            return
        error = "" if report.passed or report.skipped else _error(report)
        name = report.nodeid.partition("::")[2].replace("::", ".")
        order = ("passed", "skipped", "failed")
        known = self.outcomes.get(name)
        if known is None or order.index(report.outcome) > order.index(known["outcome"]):
            self.outcomes[name] = {"outcome": report.outcome, "served": self.served, "error": error}


def _error(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()
    return lines[0][:300] if lines else ""


def selection(model: str) -> str:
    return f"({MODELS[model]}) and {LEFT_OUT}" if MODELS[model] else LEFT_OUT


def run_one(model: str, way: str, out: Path) -> None:
    """Run the tests of a model in this process, from the folder of the checkout."""
    import pytest

    recorder = Recorder(accelerated=way == "accelerated")
    (path,) = Path("tests/models", model).glob("test_modeling_*.py")
    # the configuration of this project, not of the checkout, would ask for other plugins and markers
    options = ["-q", "-c", os.devnull, "--rootdir=.", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--tb=short", f"--timeout={LIMIT}", "-o", "timeout_method=signal", "-k", selection(model)]
    pytest.main([*options, str(path)], plugins=[recorder])
    out.write_text(json.dumps(recorder.outcomes))


def compare(original: dict[str, Any], accelerated: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of both runs, and the tests in which they differ."""
    if list(original) != list(accelerated):
        raise SystemExit("the two runs did not find the same tests")

    def counts(outcomes: dict[str, Any]) -> dict[str, int]:
        return {kind: sum(x["outcome"] == kind for x in outcomes.values()) for kind in ("passed", "failed", "skipped")}

    def only(these: dict[str, Any], those: dict[str, Any]) -> list[str]:
        return [n for n, x in these.items() if x["outcome"] == "passed" and those[n]["outcome"] != "passed"]

    lost = {n: accelerated[n]["error"] for n in only(original, accelerated)}
    return {
        "original": counts(original),
        "accelerated": counts(accelerated),
        "passed with layers computed by lcconformer": sum(
            x["outcome"] == "passed" and x["served"] > 0 for x in accelerated.values()
        ),
        "pass on the original alone": {n: {"error": e, "reason": reason(n)} for n, e in lost.items()},
        "pass accelerated alone": only(accelerated, original),
        "fail on both": {
            n: x["error"] for n, x in original.items() if x["outcome"] == accelerated[n]["outcome"] == "failed"
        },
    }


def reason(name: str) -> str | None:
    test = name.rpartition(".")[2]
    return next((why for known, why in EXCEPTIONS.items() if test.startswith(known)), None)


def about(checkout: Path) -> dict[str, Any]:
    """Return what the outcome depends on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    digests = {
        name: hashlib.sha256((checkout / "tests" / name).read_bytes()).hexdigest()[:16]
        for name in (*COMMON, *(f"models/{m}/test_modeling_{m}.py" for m in MODELS))
    }
    return {
        "lcconformer": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "transformers": importlib.metadata.version("transformers"),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "sha256 of the tests": digests,
        "selected by -k": {model: selection(model) for model in MODELS},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder that holds transformers' tests/")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON; models not run keep their entries"
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--way", choices=("original", "accelerated"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        os.chdir(args.checkout)
        run_one(args.model[0], args.way, args.out)
        return 0
    known = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model or MODELS:
            found = []
            for way in ("original", "accelerated"):
                part = Path(folder, f"{model}-{way}.json")
                command = [
                    sys.executable,
                    __file__,
                    str(args.checkout),
                    "--out",
                    str(part),
                    "--model",
                    model,
                    "--way",
                    way,
                ]
                # no network: a test that needs it fails both times
                subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
                found.append(json.loads(part.read_text()))
            known[model] = compare(*found)
    content = {**about(args.checkout), "models": {m: known[m] for m in MODELS if m in known}}
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unexplained = [n for m in known.values() for n, x in m["pass on the original alone"].items() if x["reason"] is None]
    print("\n".join([f"passes on the original alone: {n}" for n in unexplained]) or "no unexplained difference")
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
