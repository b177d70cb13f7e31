"""Abuse: random settings, calls and damaged files. Each try must work or be refused with a reason; the table counts them.

The quick round has few tries a category. A long one, and the table that is committed:

    LCCONFORMER_ABUSE_TRIES=700 LCCONFORMER_ABUSE_TABLE=bench/results/abuse.json pytest tests/abuse
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from lcconformer.runtime import write_atomically

TRIES = int(os.environ.get("LCCONFORMER_ABUSE_TRIES", "40"))
REASONED = (ValueError, NotImplementedError, OSError)
"""What the command line prints as one line; anything else would be a traceback."""

hypothesis.settings.register_profile(
    "abuse", max_examples=TRIES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("abuse")

_counts: dict[str, dict[str, int]] = {}


@pytest.fixture
def attempt(request: pytest.FixtureRequest) -> Callable[[Callable[[], object]], bool]:
    """Call it: True if it worked, False if it was refused with a reason; any other exception fails the test."""
    category = request.node.originalname.removeprefix("test_")
    counts = _counts.setdefault(category, {"tried": 0, "worked": 0, "refused": 0})

    def run(call: Callable[[], object]) -> bool:
        try:
            call()
        except REASONED as error:
            if not str(error):
                raise RuntimeError(f"{type(error).__name__} without a reason") from error
            outcome = "refused"
        else:
            outcome = "worked"
        counts["tried"] += 1
        counts[outcome] += 1
        return outcome == "worked"

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _counts:
        return
    terminalreporter.section("abuse: category, tried, worked, refused with a reason")
    for category, counts in _counts.items():
        terminalreporter.write_line(f"{category:<20}" + "".join(f"{n:>9}" for n in counts.values()))
    total = {name: sum(counts[name] for counts in _counts.values()) for name in ("tried", "worked", "refused")}
    terminalreporter.write_line(f"{'all':<20}" + "".join(f"{n:>9}" for n in total.values()))
    if table := os.environ.get("LCCONFORMER_ABUSE_TABLE"):
        write_atomically(Path(table), json.dumps({"categories": _counts, "all": total}, indent=1) + "\n")
