"""The modelled GPU: the baselines are those that the goals were made from."""

from __future__ import annotations

import pytest
from lcconformer.bench.core.gpu_model import (
    Encoder,
    baseline,
    baseline_seconds,
    gap_seconds,
    product_seconds,
    traffic_seconds,
)


@pytest.mark.parametrize(
    ("case", "training", "eager", "compiled"),
    [
        ((1, 100, 256), False, 3000, 937),
        ((32, 400, 256), False, 6326, 4093),
        ((32, 1500, 768), False, 151_900, 84_400),
        ((32, 400, 256), True, 19_100, 12_500),
        ((32, 1500, 512), True, 252_500, 147_900),
    ],
)
def test_baselines(case, training, eager, compiled):
    """Microseconds of 12 layers, from the tables of the research that set the goals."""
    e = Encoder(*case)
    assert baseline_seconds(e, training=training, compiled=False) * 1e6 == pytest.approx(eager, rel=0.01)
    assert baseline_seconds(e, training=training, compiled=True) * 1e6 == pytest.approx(compiled, rel=0.01)


def test_small_eager_encoders_wait_for_the_host():
    ops = baseline(Encoder(1, 100, 256), training=False, compiled=False)
    launches = 12 * sum(op.launches for op in ops)
    assert baseline_seconds(Encoder(1, 100, 256), training=False, compiled=False) == pytest.approx(5e-6 * launches)


def test_a_large_product_runs_at_the_rate_of_the_machine():
    n = 8192
    assert 2 * n**3 / product_seconds((1, n, n, n), 6.0 * n * n) == pytest.approx(790e12, rel=0.15)


def test_a_small_output_is_split_along_the_inner_dimension():
    whole = 2.0 * 64 * 64 * 65536 / (790e12 / 132 * 0.55)
    assert product_seconds((1, 64, 64, 65536), 2.0 * 2 * 64 * 65536) < whole / 4


def test_traffic_is_served_by_the_cache_where_it_fits():
    assert traffic_seconds(20e6) / 20 < traffic_seconds(40e6) / 40


def test_gaps():
    assert gap_seconds(dependent=True) < gap_seconds(filled=True) < gap_seconds()
