"""Intervals over seeds and over speakers."""

from __future__ import annotations

import math

import pytest

from lcconformer.ssl.reproduction.statistics import bootstrap_difference, mean_and_error, paired_difference


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7.0 / 3.0))  # variance (4 + 1 + 9) / 2 of three values
    assert mean_and_error([2.5]) == (2.5, None)


def test_the_interval_of_pairs_is_students() -> None:
    found = paired_difference([0.40, 0.50, 0.60], [0.41, 0.49, 0.63])
    # differences 0.01, -0.01, 0.03: mean 0.01, standard deviation 0.02
    half = 4.303 * 0.02 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.01, 0.01 - half, 0.01 + half))
    assert found.worst == pytest.approx(0.03)
    alone = paired_difference([0.4], [0.5])
    assert (alone.low, alone.high) == (None, None)
    assert alone.mean == alone.worst == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference([0.1, 0.2], [0.1])


def test_speakers_that_agree_leave_no_doubt() -> None:
    speakers = [f"s{i}" for i in range(5)]
    one = {who: (10 * i, 100) for i, who in enumerate(speakers)}
    other = {who: (10 * i + 3, 100) for i, who in enumerate(speakers)}
    found = bootstrap_difference([one, one], [other, other])
    assert (found.mean, found.low, found.high) == pytest.approx((0.03, 0.03, 0.03))


def test_speakers_that_disagree_widen_the_interval() -> None:
    one = {"a": (10, 100), "b": (10, 100), "c": (10, 100), "d": (10, 100)}
    other = {"a": (30, 100), "b": (10, 100), "c": (10, 100), "d": (10, 100)}
    found = bootstrap_difference([one], [other])
    # a is drawn k times with probability binomial(4, 1/4): k = 0 has 32%, k = 3 or 4 has 5%, k = 4 alone has 0.4%
    assert found.mean == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((0.0, 0.15))
    assert found.worst == pytest.approx(0.2)
    back = bootstrap_difference([other], [one])
    assert (back.mean, back.low, back.high) == pytest.approx((-0.05, -0.15, 0.0))


def test_rates_are_pooled_and_not_averaged() -> None:
    one = {"a": (0, 900), "b": (0, 100)}
    other = {"a": (9, 900), "b": (50, 100)}
    assert bootstrap_difference([one], [other]).mean == pytest.approx(59 / 1000)


def test_too_little_to_compare() -> None:
    alone = bootstrap_difference([{"a": (1, 10)}], [{"a": (2, 10)}])
    assert (alone.mean, alone.low, alone.high) == (pytest.approx(0.1), None, None)
    with pytest.raises(ValueError, match="the speakers of the two models or of the seeds differ"):
        bootstrap_difference([{"a": (1, 10)}], [{"b": (1, 10)}])
