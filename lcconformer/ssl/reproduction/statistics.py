"""Statistics of the report: means over seeds with intervals, paired differences, a paired bootstrap over speakers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap_difference", "mean_and_error", "paired_difference"]

# 97.5% quantile of Student's t by degrees of freedom, from 1 on; beyond, that of the normal distribution is near enough
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_DRAWS = 10_000

Counts = Mapping[str, tuple[int, int]]
"""Errors, and what they are over, by speaker."""


@dataclass(frozen=True)
class Interval:
    """A mean with a 95% interval; None where there is too little to tell one from. worst: the largest single value."""

    mean: float
    low: float | None
    high: float | None
    worst: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None of a single value."""
    mean = statistics.fmean(values)
    return mean, (statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of ``second - first`` over pairs (the same seed), with Student's interval.

    Raises:
        ValueError: there is no pair, or the numbers of values differ.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired_difference: {len(first)} and {len(second)} values; expected as many, one or more")
    differences = [b - a for a, b in zip(first, second)]
    mean, error = mean_and_error(differences)
    if error is None:
        return Interval(mean, None, None, mean)
    t = _T[len(differences) - 2] if len(differences) - 2 < len(_T) else 1.96
    return Interval(mean, mean - t * error, mean + t * error, max(differences))


def bootstrap_difference(first: Sequence[Counts], second: Sequence[Counts]) -> Interval:
    """Difference ``second - first`` of error rates, with the interval that drawing the speakers anew gives.

    Each draw takes as many speakers as there are, with replacement, the same ones for both models and all seeds.

    Args:
        first, second: for each seed, the errors and the total of each speaker; the speakers are the same everywhere.

    Raises:
        ValueError: the speakers differ, or there are none.
    """
    speakers = sorted(first[0]) if first else []
    if not speakers or any(sorted(counts) != speakers for counts in (*first, *second)):
        raise ValueError(
            "bootstrap_difference: the speakers of the two models or of the seeds differ, or there are none"
        )

    def table(seeds: Sequence[Counts]) -> np.ndarray:  # [speakers, 2], summed over seeds
        return np.array([[sum(counts[s][i] for counts in seeds) for i in (0, 1)] for s in speakers], dtype=np.float64)

    one, other = table(first), table(second)
    drawn = np.random.default_rng(0).integers(len(speakers), size=(_DRAWS, len(speakers)))
    sums = [each[drawn].sum(1) for each in (one, other)]
    differences = sums[1][:, 0] / sums[1][:, 1] - sums[0][:, 0] / sums[0][:, 1]
    mean = float(other[:, 0].sum() / other[:, 1].sum() - one[:, 0].sum() / one[:, 1].sum())
    each = other[:, 0] / other[:, 1] - one[:, 0] / one[:, 1]
    if len(speakers) == 1:
        return Interval(mean, None, None, float(each.max()))
    low, high = np.quantile(differences, [0.025, 0.975])
    return Interval(mean, float(low), float(high), float(each.max()))
