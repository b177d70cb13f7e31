"""``lcconformer demo``: two small encoders pretrained on real speech, compared and reported in minutes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from ..runtime import check_output
from ..ssl.demo import load_demo_speech, plan_for_time, run_demo
from ..ssl.demo.summary import format_results

__all__ = ["add_arguments", "run"]

_MINUTES = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "It uses two CPU threads and no network.  DIR gets report.html (one file, plots inside), the plots as PNG files, "
        "results.json, and both checkpoints, which 'probe' and 'consistency' read."
    )
    parser.add_argument(
        "--out", default="lcconformer-demo", metavar="DIR", help="folder of the report (default: ./lcconformer-demo)"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="your own speech: a LibriSpeech folder tree, or a zip or folder with meta.jsonl; probes need its phone "
        "alignments (default: the 23 minutes of English prompts that come with the package)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        help=f"about how long it may take on two cores (default {_MINUTES:g})",
    )


def run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.minutes <= 600:
        raise ValueError(f"--minutes is {args.minutes:g}; expected 0.5 to 600")
    check_output("--out", args.out, folder=True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        train, test = load_demo_speech(args.data)
        print(f"training speech: {train}\ntest speech:     {test}", file=sys.stderr)
        results = run_demo(train, test, plan_for_time(train, args.minutes), args.out)
    except KeyboardInterrupt:
        print(f"interrupted: nothing of this run was kept, and nothing was written to {args.out}", file=sys.stderr)
        return 130
    print(format_results(results))
    print(f"\nreport: {Path(args.out) / 'report.html'}")
    return 0
