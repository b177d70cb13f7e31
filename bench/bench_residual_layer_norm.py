"""lcconformer.ops.residual_layer_norm: ``pytest bench/bench_residual_layer_norm.py --benchmark-only``."""

MODES = ("residual_layer_norm:forward", "residual_layer_norm:training")


def test_residual_layer_norm(measure, case, provider):
    measure(case, provider)
