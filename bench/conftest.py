"""``pytest bench --benchmark-only``: the suite's cases as pytest-benchmark tests, one group per case."""

from __future__ import annotations

import pytest
import torch
from lcconformer.bench.core.case import Case, parse_shapes
from lcconformer.bench.core.timing import flush_l2
from lcconformer.bench.providers.registry import Provider, choose
from lcconformer.bench.runs.gate import Gate
from lcconformer.bench.runs.suite import Skip, prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU, CPU = ("1x100,8x400,32x400", 256, 12, "bfloat16"), ("1x100", 128, 2, "float32")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise ``case`` and ``provider``: the module's MODES by the shapes for this machine by all providers."""
    if "provider" not in metafunc.fixturenames:
        return
    shapes, d_model, layers, dtype = GPU if DEVICE == "cuda" else CPU
    cases = [
        Case(mode, b, t, d_model, layers, layers, dtype, DEVICE)
        for mode in metafunc.module.MODES
        for b, t in parse_shapes(shapes)
    ]
    pairs = [(case, provider) for case in cases for provider in choose(None)]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case}-{provider}" for case, provider in pairs])


@pytest.fixture
def measure(benchmark):
    """Check a provider on a case, then time it; skip with the reason if it cannot run."""

    def run(case: Case, provider: Provider) -> None:
        try:
            runner = prepare(provider, case, Gate(case))
        except Skip as skip:
            pytest.skip(str(skip))

        def call() -> None:
            runner()
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = str(case)
        benchmark.extra_info.update(provider=provider.name, backend=provider.backend)
        # flushed before every round, untimed
        before = {"setup": flush_l2} if case.device == "cuda" else {}
        benchmark.pedantic(call, rounds=20 if case.device == "cuda" else 5, iterations=1, warmup_rounds=0, **before)

    return run
