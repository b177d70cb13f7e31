"""``lcconformer tune``: measure launch configurations of the Triton kernels on this GPU and file the fastest."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..runtime import check_output
from ..tune import DTYPES, OPS, LayerShape, tune_gpu

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--op", choices=OPS, action="append", help="tune this op only (repeatable; default: all)")
    add("--batch", type=int, default=LayerShape.batch, help=f"number of utterances {shown}")
    add("--frames", type=int, default=LayerShape.frames, help=f"frames of each utterance {shown}")
    add("--d-model", type=int, default=LayerShape.d_model, help=f"width {shown}")
    add("--ffn-dim", type=int, help="hidden width of the feed-forward (default: 4 times the width)")
    add("--heads", type=int, default=LayerShape.heads, help=f"attention heads {shown}")
    add("--kernel-size", type=int, default=LayerShape.kernel_size, help=f"taps of the convolution {shown}")
    norms = ("layer", "batch", "group", "none")
    add("--norm", choices=norms, default=LayerShape.norm, help=f"norm of the convolution {shown}")
    add("--dropout", type=float, default=LayerShape.dropout, help=f"dropout rate {shown}")
    add("--dtype", choices=DTYPES, default=LayerShape.dtype, help=f"dtype of the activations {shown}")
    add("--folder", type=Path, help="write to this folder; set LCCONFORMER_TUNED to it to have it read")


def run(args: argparse.Namespace) -> None:
    check_output("--folder", args.folder, folder=True)
    layer = LayerShape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LayerShape)})
    path, count = tune_gpu(layer, args.op or OPS, args.folder)
    print(f"{count} configurations in {path}")
