"""lcconformer.ops.glu_depthwise_conv, forward and training: ``pytest bench/bench_glu_depthwise_conv.py --benchmark-only``."""

MODES = ("glu_depthwise_conv:forward", "glu_depthwise_conv:training")


def test_glu_depthwise_conv(measure, case, provider):
    measure(case, provider)
