"""Position encodings against their formulas, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from lcconformer.positions import apply_rotary, relative_sinusoids, rotary_tables

CPU = torch.device("cpu")


@pytest.mark.parametrize(("frames", "width"), [(1, 2), (7, 6), (64, 16)])
def test_sinusoids(frames, width):
    table = relative_sinusoids(frames, width, device=CPU, dtype=torch.float64)
    assert table.shape == (2 * frames - 1, width)
    for row in range(2 * frames - 1):
        position = frames - 1 - row
        for pair in range(width // 2):
            angle = position / 10000 ** (2 * pair / width)
            assert table[row, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[row, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_sinusoids_in_half_precision_are_those_of_float32_rounded():
    """Angles of thousands of radians are computed in float32, whatever the dtype of the result."""
    exact = relative_sinusoids(3000, 8, device=CPU, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(relative_sinusoids(3000, 8, device=CPU, dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize(("frames", "width"), [(1, 2), (9, 8)])
def test_rotary_is_a_rotation_of_pairs(frames, width):
    x = torch.randn(2, frames, 3, width, dtype=torch.float64)
    cos, sin = rotary_tables(frames, width, device=CPU, dtype=torch.float64)
    got = torch.view_as_complex(torch.stack(apply_rotary(x, cos, sin).chunk(2, -1), -1))
    half = width // 2
    rate = torch.tensor([10000 ** (-2 * k / width) for k in range(half)], dtype=torch.float64)
    angle = torch.arange(frames, dtype=torch.float64)[:, None, None] * rate  # [T, 1, width / 2]
    want = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    cos, sin = rotary_tables(20, 8, device=CPU, dtype=torch.float64)
    q, k = (apply_rotary(x.expand(1, 20, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in (-5, 0, 3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
