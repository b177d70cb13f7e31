"""Cases and shapes that make no sense are refused."""

import pytest
from lcconformer.bench.core.case import Case, parse_shapes

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "nonsense"}, "mode is 'nonsense'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"depth": 3}, "depth is 3; expected 1 to the number of layers, 2"),
        ({"d_model": 100}, "d_model is 100; expected a multiple of 64"),
        ({"batch": 0}, "expected positive sizes"),
    ],
)
def test_bad_cases(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


def test_shapes():
    assert parse_shapes("1x400,8X100") == [(1, 400), (8, 100)]
    with pytest.raises(ValueError, match=r"shapes are '8-100'; expected BATCHxFRAMES"):
        parse_shapes("8-100")
