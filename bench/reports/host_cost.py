"""What launching costs the host, over a driver that does nothing: ``python -m lcconformer.bench.reports.host_cost``.

The inference chain (:mod:`lcconformer.loop.chain`) where it is not recorded in a CUDA graph: microseconds of the processor
for a loop whose launches are bound, and for a whole first call, which makes the buffers and binds the launches.  No GPU takes
part: the kernels are compiled for sm_90 and not run, so that this is Python and the allocation of buffers.
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
from torch import Tensor

from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.loop.chain import Chain
from lcconformer.loop.recording import unrecorded
from lcconformer.runtime import commit, write_atomically

from ..core import idle_driver
from ..core.rows import device_name

__all__ = ["main", "of_the_chain"]

FRAMES, WIDTH, LAYERS = 128, 256, 12  # (1, 100) rounded up to a multiple of 64 frames
REPEATS, WARM = 500, 50


def _medians(*calls: Callable[[], object]) -> list[float]:
    """Return the microseconds of each call, made in turn: of this thread alone, whatever else the machine does."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM + REPEATS):
        for call, own in zip(calls, times):
            idle_driver.LAUNCHED.clear()
            idle_driver.TOLD.clear()
            begin = time.thread_time()
            call()
            own.append(time.thread_time() - begin)
    return [statistics.median(own[WARM:]) * 1e6 for own in times]


def _launches(call: Callable[[], object]) -> int:
    idle_driver.LAUNCHED.clear()
    call()
    return len(idle_driver.LAUNCHED)


def of_the_chain() -> dict[str, float]:
    """Return launches and microseconds at B = 1, of a loop and of a first call.

    A loop is the difference of 12 loops and 2, which share all the rest.  Without positions: their table and their product are
    PyTorch's, which would compute them here.
    """
    config = ConformerConfig(
        d_model=WIDTH, num_heads=WIDTH // 64, ffn_dim=4 * WIDTH, num_layers=LAYERS, position="none"
    )
    encoder = ConformerEncoder(config).to(torch.bfloat16).eval()
    x, lengths = torch.zeros(1, FRAMES, WIDTH, dtype=torch.bfloat16), torch.tensor([FRAMES])
    kept = Chain(encoder, x, lengths, unrecorded)

    def short() -> list[Tensor]:
        return list(kept.run(encoder, 2, False))

    def long() -> list[Tensor]:
        return list(kept.run(encoder, LAYERS, False))

    def first() -> list[Tensor]:
        return list(Chain(encoder, x, lengths, unrecorded).run(encoder, LAYERS, False))

    with torch.no_grad():
        few, many, whole = map(_launches, (short, long, first))
        of_few, of_many = _medians(short, long)
        (of_whole,) = _medians(first)
    return {
        "launches_a_loop": (many - few) / (LAYERS - 2),
        "microseconds_a_loop": round((of_many - of_few) / (LAYERS - 2), 1),
        "launches_a_first_call": whole,
        "microseconds_a_first_call": round(of_whole, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.reports.host_cost", description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON there, such as bench/results/host_cost.json")
    args = parser.parse_args(argv)
    if INTERPRETED:
        print("bench.host_cost: kernels are not compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    idle_driver.install()
    found = {
        "commit": commit(), "machine": device_name("cpu"), "triton": triton.__version__, "batch": 1, "frames": FRAMES,
        "d_model": WIDTH, **of_the_chain(),
    }  # fmt: skip
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.out:
        write_atomically(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
