"""The rule that every test, benchmark and doctor's finding uses."""

import math

import pytest
import torch

from lcconformer.tolerance import allowed_error, largest_error, passes, relative_error


def test_errors():
    ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
    out = torch.tensor([1.5, -4.25])
    assert largest_error(out, ref) == 0.5
    assert relative_error(out, ref) == 0.125


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_an_infinite_error(value):
    ref = torch.ones(3, dtype=torch.float64)
    out = torch.tensor([1.0, value, 1.0])
    assert largest_error(out, ref) == relative_error(out, ref) == math.inf


def test_without_elements_or_scale():
    empty = torch.empty(0, dtype=torch.float64)
    assert largest_error(empty, empty) == relative_error(empty, empty) == 0.0
    zeros = torch.zeros(2, dtype=torch.float64)
    assert relative_error(zeros, zeros) == 0.0
    assert not passes(relative_error(zeros + 1e-300, zeros), 1.0)


def test_a_multiple_of_what_pytorch_has_and_two_roundings():
    assert allowed_error(0.25, 3.0, torch.bfloat16) == 0.75 + 2 * 2**-7
    assert allowed_error(0.0, 2.0, torch.float16, scale=8.0) == 8 * 2 * 2**-10


@pytest.mark.parametrize(
    ("error", "allowed", "expected"),
    [
        (1.0, 1.0, True),
        (1.1, 1.0, False),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        # plain PyTorch overflowed: nothing can be said
        (1.0, math.inf, False),
        (math.inf, math.inf, False),
    ],
)
def test_only_finite_errors_pass(error, allowed, expected):
    assert passes(error, allowed) is expected
