"""The benchmark suite: ``python -m lcconformer bench``, ``pytest bench --benchmark-only``, ``bash bench/gpu.sh OUT``."""
