"""lcconformer.ops.feed_forward, forward and training: ``pytest bench/bench_feed_forward.py --benchmark-only``."""

MODES = ("feed_forward:forward", "feed_forward:training")


def test_feed_forward(measure, case, provider):
    measure(case, provider)
