"""Every op at small odd shapes, for compute-sanitizer: ``compute-sanitizer python -m lcconformer.bench.gpu.sanitized``.

The results count as little as the times; checks.py and the tests look at the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lcconformer.tune import calls

from .cases import odd_shapes
from .cuda_calls import cuda_calls

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.sanitized", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.small else "cuda")
    for layer in odd_shapes(args.small):
        for name, call in calls(layer, device):
            call()
            print(f"{name}, T = {layer.frames}", flush=True)
        if device.type == "cpu":
            continue
        for name, call in cuda_calls(layer, device):
            try:
                call()
                torch.cuda.synchronize()
                print(f"{name}, T = {layer.frames}", flush=True)
            except NotImplementedError as error:
                print(f"missing: {name}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
