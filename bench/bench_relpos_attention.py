"""lcconformer.ops.relpos_attention, forward and training: ``pytest bench/bench_relpos_attention.py --benchmark-only``."""

MODES = ("relpos_attention:forward", "relpos_attention:training")


def test_relpos_attention(measure, case, provider):
    measure(case, provider)
