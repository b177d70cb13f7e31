"""The encoder against plain PyTorch and the peers: ``pytest bench/bench_encoder.py --benchmark-only``."""

MODES = ("inference", "training")


def test_encoder(measure, case, provider):
    measure(case, provider)
