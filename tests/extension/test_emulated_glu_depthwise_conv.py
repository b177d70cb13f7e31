"""The CUDA kernels of glu_depthwise_conv on the CPU, under sanitizers and random schedules, against a float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest

FRAMES = (1, 7, 63, 65, 127, 203)
WIDTHS = (1, 3, 31, 63)
DTYPES = ("float32", "float16", "bfloat16")


def check(emulate: Any, **case: Any) -> None:
    """max |out - ref| <= r * max |low - ref| + two roundings of the largest value; and the same bits in any schedule."""
    case = {"b": 2, "c": 5, "k": 31, "dtype": "float32", "lengths": None, "norm": "none", "bias": True,
            "strided": False, "slots": 0, "seed": 0, **case}  # fmt: skip
    answer = emulate(**case)
    for name, got in answer["tensors"].items():
        bound = (2 if name == "y" else 3) * got["low"] + got["floor"]
        assert got["error"] <= bound, f"{name}: error {got['error']:.3g} > {bound:.3g}; eager has {got['low']:.3g}"
    assert answer["same_bits"], "the result depends on the schedule"


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("t", FRAMES)
def test_odd_shapes(emulate, t, k):
    check(emulate, t=t, k=k, lengths=[t // 2, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 65, 130])
def test_channels_and_dtypes(emulate, c, dtype):
    check(emulate, t=67, c=c, dtype=dtype, lengths=[67, 40])


@pytest.mark.parametrize("k", [33, 47, 49])
def test_widths_around_the_groups_of_taps(emulate, k):
    check(emulate, t=70, k=k)


@pytest.mark.parametrize("lengths", [[0, 65], [0, 0], [64, 1], [65, 65]])
def test_lengths(emulate, lengths):
    check(emulate, t=65, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_batch_norm(emulate, bias, dtype):
    check(emulate, t=65, c=6, norm="batch", bias=bias, dtype=dtype, lengths=[65, 30])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [5, 6])
def test_strided_input_and_gradient(emulate, c, dtype):
    check(emulate, t=66, c=c, k=7, dtype=dtype, strided=True, lengths=[66, 9])


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_nothing_to_do(emulate, b, t):
    check(emulate, b=b, t=t)


@pytest.mark.parametrize("slots", [1, 3])
def test_blocks_that_walk_over_several_tiles(emulate, slots):
    check(emulate, t=200, slots=slots, lengths=[130, 200])  # 8 tiles


def test_enough_blocks_for_every_tile_up_to_a_thousand(emulate):
    check(emulate, b=40, t=3, c=2, k=3, lengths=[i % 4 for i in range(40)])
