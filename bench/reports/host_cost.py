"""What launching costs the host, over a driver that does nothing: ``python -m lcconformer.bench.reports.host_cost``.

Microseconds of a loop of the inference chain (:mod:`lcconformer.loop.chain`) that is not recorded in a CUDA graph.  No GPU
takes part: the kernels are compiled for sm_90 and not run, so that this is Python, Triton and the allocation of outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from lcconformer.kernels.common import INTERPRETED

from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.loop.chain import Chain
from lcconformer.loop.recording import unrecorded
from lcconformer.runtime import commit, write_atomically

from ..core import idle_driver
from ..core.rows import device_name

__all__ = ["main", "of_a_loop"]

FRAMES, WIDTH, LAYERS = 128, 256, 12  # (1, 100) rounded up to a multiple of 64 frames
REPEATS, WARM = 500, 50


def _microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM + REPEATS):
        idle_driver.LAUNCHED.clear()
        idle_driver.TOLD.clear()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM:]) * 1e6


def of_a_loop() -> tuple[float, float]:
    """Return launches and microseconds of a loop at B = 1: the difference of 12 loops and 2, which share all the rest."""
    config = ConformerConfig(d_model=WIDTH, num_heads=WIDTH // 64, ffn_dim=4 * WIDTH, num_layers=LAYERS)
    encoder = ConformerEncoder(config).to(torch.bfloat16).eval()
    x = torch.zeros(1, FRAMES, WIDTH, dtype=torch.bfloat16)
    chain = Chain(encoder, x, torch.tensor([FRAMES]), unrecorded)

    def call(depth: int) -> tuple[int, float]:
        microseconds = _microseconds(lambda: list(chain.run(encoder, depth, False)))
        return len(idle_driver.LAUNCHED), microseconds

    with torch.no_grad():
        (few, short), (many, long) = call(2), call(LAYERS)
    return (many - few) / (LAYERS - 2), (long - short) / (LAYERS - 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.reports.host_cost", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON there, such as bench/results/host_cost.json")
    args = parser.parse_args(argv)
    if INTERPRETED:
        print("bench.host_cost: kernels are not compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    idle_driver.install()
    launches, microseconds = of_a_loop()
    found = {
        "commit": commit(), "machine": device_name("cpu"), "triton": triton.__version__, "batch": 1, "frames": FRAMES,
        "d_model": WIDTH, "launches_a_loop": launches, "microseconds_a_loop": round(microseconds, 1),
    }  # fmt: skip
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.out:
        write_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
