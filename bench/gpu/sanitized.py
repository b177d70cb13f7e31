"""Every op at small odd shapes, for compute-sanitizer: ``compute-sanitizer python -m lcconformer.bench.gpu.sanitized``.

The results count as little as the times; checks.py and the tests look at the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lcconformer.tune import LayerShape, calls

from .convolution import cuda_convolutions

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.sanitized", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.small else "cuda")
    dtype = "float32" if args.small else "bfloat16"
    for frames in (7,) if args.small else (1, 77, 203):
        layer = LayerShape(3, frames, 32 if args.small else 128, heads=1 if args.small else 2, dropout=0.1, dtype=dtype)
        for name, call in calls(layer, device):
            call()
            print(f"{name}, T = {frames}", flush=True)
        if device.type == "cpu":
            continue
        for name, call in cuda_convolutions(layer, device):
            try:
                call()
                torch.cuda.synchronize()
                print(f"{name}, T = {frames}", flush=True)
            except NotImplementedError as error:
                print(f"missing: {name}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
