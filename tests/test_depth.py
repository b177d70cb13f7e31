"""Sampled depth: distributions, closed forms, and values that must never change silently."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lcconformer import DepthSampler, ExitRule

STEPS = 10_000
# depths of steps 0 ... 11, 1000 and 1e9: a run resumed with a newer version must train the same depths
GOLDEN = {
    ("uniform", 0): (2, 4, 11, 3, 6, 1, 7, 4, 12, 3, 9, 11, 1, 11),
    ("uniform", 1): (9, 5, 11, 10, 5, 3, 1, 12, 6, 6, 5, 1, 4, 9),
    ("uniform", 12345): (8, 2, 12, 11, 1, 3, 6, 8, 3, 6, 10, 7, 12, 7),
    ("curriculum", 0): (1, 1, 3, 1, 2, 1, 3, 2, 6, 2, 6, 7, 1, 11),
    ("log_normal", 0): (4, 1, 7, 1, 7, 1, 5, 2, 1, 2, 2, 6, 2, 1),
    ("layer_drop", 0): (7, 9, 10, 6, 8, 6, 8, 7, 8, 5, 7, 9, 9, 7),
    ("log_normal", 1): (12, 5, 12, 3, 5, 12, 12, 3, 7, 11, 9, 6, 6, 2),
}


@pytest.mark.parametrize(("kind", "seed"), GOLDEN)
def test_golden(kind, seed):
    sampler = DepthSampler(kind, num_layers=12, seed=seed, steps=20)
    assert tuple(sampler.depths(s)[0] for s in [*range(12), 1000, 10**9]) == GOLDEN[kind, seed]


def test_a_function_of_seed_and_step_alone():
    """No state: any order, any instance, and no global random number is used or moved."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    forward = [DepthSampler(seed=3).depths(s) for s in range(50)]
    sampler = DepthSampler(seed=3)
    assert [sampler.depths(s) for s in reversed(range(50))] == forward[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert forward != [DepthSampler(seed=4).depths(s) for s in range(50)]


@pytest.mark.parametrize(("low", "num_layers"), [(1, 12), (4, 12), (1, 1), (7, 7), (1, 3)])
def test_uniform(low, num_layers):
    sampler = DepthSampler(num_layers=num_layers, low=low, seed=7)
    drawn = [sampler.depths(s)[0] for s in range(STEPS)]
    outcomes = num_layers - low + 1
    expected = STEPS / outcomes
    assert set(drawn) == set(range(low, num_layers + 1))
    chi_square = sum((drawn.count(k) - expected) ** 2 / expected for k in range(low, num_layers + 1))
    # 99.9% quantile, Wilson and Hilferty's approximation
    degrees = max(outcomes - 1, 1)
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    # E[U{a..b}] = (a + b) / 2, variance ((b - a + 1)^2 - 1) / 12
    assert sampler.mean_depth() == (low + num_layers) / 2
    error = math.sqrt((outcomes**2 - 1) / 12 / STEPS)
    assert abs(sum(drawn) / STEPS - sampler.mean_depth()) <= 4 * error


def test_uniform_depths_of_successive_steps_are_independent():
    drawn = torch.tensor([DepthSampler(seed=5).depths(s)[0] for s in range(STEPS)], dtype=torch.float64)
    drawn = drawn - drawn.mean()
    for lag in (1, 2, 3):
        correlation = (drawn[lag:] * drawn[:-lag]).mean() / drawn.square().mean()
        assert abs(correlation) < 4 / math.sqrt(STEPS)


def test_the_paper_saves_its_share_of_layers():
    """U{1..12} runs 6.5 of 12 layers on average (arXiv 2105.00812)."""
    assert DepthSampler(num_layers=12).mean_depth() / 12 == 6.5 / 12


def test_fixed():
    sampler = DepthSampler("fixed", num_layers=9)
    assert {sampler.depths(s) for s in range(20)} == {(9,)}
    assert sampler.mean_depth() == 9


def test_curriculum():
    sampler = DepthSampler("curriculum", num_layers=8, low=2, steps=100, seed=1)
    drawn = [sampler.depths(s)[0] for s in range(2000)]
    limits = [2 + round(6 * min(1.0, (s + 1) / 100)) for s in range(2000)]
    assert all(2 <= d <= limit for d, limit in zip(drawn, limits))
    assert max(drawn[:8]) == 2
    assert set(drawn[100:]) == set(range(2, 9))
    # the expectation of each step is (low + its limit) / 2
    assert abs(sum(drawn) / 2000 - sum(2 + limit for limit in limits) / 4000) < 4 * 2 / math.sqrt(2000)
    assert sampler.mean_depth() == sum(drawn[:100]) / 100
    assert sampler.mean_depth(2000) == sum(drawn) / 2000


def test_log_normal():
    wide = DepthSampler("log_normal", num_layers=200, mean=20.0, sigma=0.5)
    drawn = [wide.depths(s)[0] for s in range(STEPS)]
    assert min(drawn) >= 1
    # a Poisson variable whose rate has mean m: mean m, variance m + m^2 (exp(sigma^2) - 1)
    variance = 20 + 400 * (math.exp(0.25) - 1)
    assert abs(sum(drawn) / STEPS - 20) < 4 * math.sqrt(variance / STEPS)
    assert abs(sum((d - 20) ** 2 for d in drawn) / STEPS / variance - 1) < 0.15
    assert wide.mean_depth() == sum(drawn) / STEPS
    narrow = DepthSampler("log_normal", num_layers=6, low=3)
    assert {narrow.depths(s)[0] for s in range(2000)} == {3, 4, 5, 6}


def test_sandwich():
    sampler = DepthSampler("sandwich", num_layers=12, low=2, seed=1)
    drawn = [sampler.depths(s) for s in range(2000)]
    for depths in drawn:
        assert depths[0] == 12
        assert depths[-1] == 2
        assert list(depths) == sorted(set(depths), reverse=True)
    uniform = DepthSampler("uniform", num_layers=12, low=2, seed=1)
    assert all(uniform.depths(s)[0] in depths for s, depths in enumerate(drawn))
    # the shallower depths come out of the deepest run
    assert sampler.mean_depth() == 12


@pytest.mark.parametrize(("low", "num_layers"), [(1, 6), (4, 12), (1, 1), (5, 5)])
def test_layer_drop_keeps_each_layer_as_often_as_the_others(low, num_layers):
    sampler = DepthSampler("layer_drop", num_layers=num_layers, low=low, seed=3)
    kept = [sampler.layers(s) for s in range(STEPS)]
    assert all(layers == tuple(sorted({*layers})) for layers in kept)
    assert [sampler.depths(s) for s in range(STEPS)] == [(len(layers),) for layers in kept]
    assert min(len(layers) for layers in kept) >= 1
    keep = (low + num_layers) / (2 * num_layers)
    error = math.sqrt(keep * (1 - keep) / STEPS)
    # where all would be left out, one is not
    extra = (1 - keep) ** num_layers
    for k in range(num_layers):
        assert abs(sum(k in layers for layers in kept) / STEPS - keep) <= 4 * error + extra
    # as many as uniform, but for that
    assert sampler.mean_depth() == pytest.approx((low + num_layers) / 2 + extra)
    spread = math.sqrt(num_layers * keep * (1 - keep) / STEPS)
    assert abs(sum(map(len, kept)) / STEPS - sampler.mean_depth()) <= 4 * spread + 1e-9


def test_layer_drop_leaves_layers_out_independently():
    sampler = DepthSampler("layer_drop", num_layers=8, seed=9)
    kept = torch.zeros(STEPS, 8, dtype=torch.float64)
    for step in range(STEPS):
        kept[step, list(sampler.layers(step))] = 1.0
    off = torch.corrcoef(kept.T) - torch.eye(8)
    assert float(off.abs().max()) < 4.5 / math.sqrt(STEPS)
    assert DepthSampler("uniform").layers(0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "random"}, "kind is 'random'; expected one of uniform, fixed"),
        ({"low": 0}, "low is 0 with num_layers = 12; expected an integer, 1 <= low <= num_layers"),
        ({"low": 1.5}, "low is 1.5 with num_layers = 12; expected an integer"),
        ({"low": 13}, "low is 13 with num_layers = 12"),
        ({"num_layers": 0}, "num_layers is 0; expected an integer from 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0; expected an integer"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"kind": "curriculum"}, "steps is 0; expected an integer, and 1 or more for a curriculum"),
        ({"steps": math.inf}, "steps is inf; expected an integer"),
        *[
            ({"sigma": sigma}, f"sigma is {re.escape(repr(sigma))}; expected a finite number above 0 and below 10")
            for sigma in (0.0, -1.0, math.nan, math.inf, 1e200)
        ],
        *[
            ({"kind": "log_normal", "mean": mean}, f"mean is {mean}; expected a finite number above 0")
            for mean in (0.0, math.nan, math.inf)
        ],
    ],
    ids=str,
)
def test_bad_sampler(arguments, message):
    with pytest.raises(ValueError, match=message):
        DepthSampler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "loss"}, "kind is 'loss'; expected 'fixed', 'change', 'cosine' or 'entropy'"),
        ({}, "kind 'fixed' needs depth"),
        ({"depth": 0}, "depth is 0; expected an integer from 1"),
        ({"depth": 2.0}, "depth is 2.0; expected an integer from 1"),
        *[
            ({"kind": "change", "threshold": x}, f"threshold is {x}; expected a finite number above 0")
            for x in (0.0, math.nan, math.inf)
        ],
        ({"kind": "cosine", "min_depth": 0}, "min_depth is 0; expected an integer from 1"),
    ],
    ids=str,
)
def test_bad_exit_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitRule(**arguments)


def test_log_normal_at_its_limits():
    for mean in (1e-6, 1e6):
        sampler = DepthSampler("log_normal", num_layers=5, mean=mean, sigma=9.9)
        assert {sampler.depths(step)[0] for step in range(300)} <= set(range(1, 6))


def test_exit_distances():
    old = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])  # [B, T, D]
    new = torch.tensor([[[3.0, 4.5], [9.0, 9.0]], [[0.0, 1.0], [0.0, 5.0]]])
    lengths = torch.tensor([1, 2])
    change = ExitRule("change").distance(new, old, lengths)
    torch.testing.assert_close(change, torch.tensor([0.5 / 5.0, math.sqrt(2 + 9) / math.sqrt(5)]))
    cosine = ExitRule("cosine").distance(new, old, lengths)
    first = 1 - (3 * 3 + 4 * 4.5) / (5 * math.hypot(3, 4.5))
    torch.testing.assert_close(cosine, torch.tensor([first, (1.0 + 0.0) / 2]))
    whole = ExitRule("cosine").distance(new[1:], old[1:], None)
    torch.testing.assert_close(whole, torch.tensor([0.5]))


def test_exit_distance_ignores_padding_and_survives_silence():
    old, new = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    new[:, 2] = torch.nan
    lengths = torch.tensor([2, 0])
    for kind in ("change", "cosine"):
        distance = ExitRule(kind).distance(new, old, lengths)
        assert distance.isfinite().all(), kind
    with pytest.raises(ValueError, match=r"use Recogniser\.transcribe"):
        ExitRule("entropy").distance(new, old, lengths)
