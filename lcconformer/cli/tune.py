"""``lcconformer tune``: measure launch configurations of the Triton kernels on this GPU and file the fastest."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..tune import DTYPES, OPS, LayerShape, tune_gpu

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, action="append", help="only this one (repeatable; default: all)")
    parser.add_argument("--batch", type=int, default=LayerShape.batch, help="utterances (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=LayerShape.frames, help="frames of each (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=LayerShape.d_model, help="width (default: %(default)s)")
    parser.add_argument("--ffn-dim", type=int, help="hidden width of the feed-forward (default: 4 times the width)")
    parser.add_argument("--heads", type=int, default=LayerShape.heads, help="attention heads (default: %(default)s)")
    parser.add_argument(
        "--kernel-size", type=int, default=LayerShape.kernel_size, help="of the convolution (default: %(default)s)"
    )
    parser.add_argument(
        "--norm", choices=("layer", "batch", "group", "none"), default=LayerShape.norm, help="of the convolution"
    )
    parser.add_argument("--dropout", type=float, default=LayerShape.dropout, help="rate (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=LayerShape.dtype, help="of the activations (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="write there; for it to be read, set LCCONFORMER_TUNED to it")


def run(args: argparse.Namespace) -> None:
    layer = LayerShape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LayerShape)})
    path, count = tune_gpu(layer, args.op or OPS, args.folder)
    print(f"{count} configurations in {path}")
