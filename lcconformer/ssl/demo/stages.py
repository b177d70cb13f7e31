"""One progress bar for all stages of the demo."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

from ...runtime import ProgressBar

__all__ = ["Stages"]


class Stages:
    """One progress bar over several stages.

    Args:
        shares: the stages in order, each with its part of the total time, in any unit.
        show: draw the bar, on the standard error.
    """

    def __init__(self, shares: dict[str, float], show: bool) -> None:
        total = sum(shares.values())
        self._ends = dict(zip(shares, itertools.accumulate(share / total for share in shares.values())))
        self._shares = {name: share / total for name, share in shares.items()}
        self._number = {name: f"[{i}/{len(shares)}]" for i, name in enumerate(shares, 1)}
        self._bar = ProgressBar() if show else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Context of a stage; yields ``report(part of the stage done, text shown beside it)``."""

        def report(part: float, note: str = "") -> None:
            if self._bar is not None:
                done = self._ends[name] - self._shares[name] * (1.0 - part)
                self._bar.update(done, f"{self._number[name]} {name}  {note}".rstrip())

        report(0.0)
        yield report
        report(1.0)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
