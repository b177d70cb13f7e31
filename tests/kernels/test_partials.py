"""Sums of partial results."""

from __future__ import annotations

import pytest
import torch
from lcconformer.kernels import partials

from lcconformer.loop.gradients import add_partial_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("count", [1, 3, partials.SEGMENTS + 2])
def test_accumulate(count):
    """Parts of any shape, added to their places in the total and nowhere else; the same bits every time."""
    shapes = [(1 + 37 * i % 70, *((2, 1 + 13 * i % 80) if i % 2 else (1 + 29 * i % 200,))) for i in range(count)]
    parts = [torch.randn(shape).to(DEVICE) for shape in shapes]
    parts[-1] = parts[-1].bfloat16()
    offsets, end = [], 3
    for part in reversed(parts):
        offsets.insert(0, end)
        end += part[0].numel() + 5
    start = torch.randn(end).to(DEVICE)
    want = start.double()
    add_partial_sums([part.double() for part in parts], want, offsets)
    results = []
    for _ in range(2):
        results.append(start.clone())
        partials.accumulate(parts, results[-1], offsets)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), want, rtol=1e-5, atol=1e-5)
    between = torch.ones(end, dtype=torch.bool)
    for part, at in zip(parts, offsets):
        between[at : at + part[0].numel()] = False
    assert torch.equal(results[0][between.to(DEVICE)], start[between.to(DEVICE)])


def test_no_parts():
    total = torch.ones(4).to(DEVICE)
    partials.accumulate([torch.empty(0, 4).to(DEVICE)], total, [0])
    assert torch.equal(total, torch.ones(4).to(DEVICE))
