"""``python -m lcconformer bench``: run the benchmark suite on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lcconformer.runtime import check_output, commit
from lcconformer.validation import need_integer, need_number

from .core.case import DTYPES, OPS, Case, parse_shapes
from .core.contention import neighbours, parse_contention
from .core.interrupts import Interrupts
from .core.rows import Results, Row, device_name
from .providers.registry import choose
from .reports.table import case_tables, flops_rate, notes, number
from .runs.suite import run_case

__all__ = ["add_arguments", "run"]

SHAPES = {"cpu": "1x16,1x100,1x400,8x400", "cuda": "1x100,1x400,8x400,32x400,32x1500"}
# utterances x longest, streams x chunk
PACKED_SHAPES, STREAM_SHAPES = "16x800", "1x16,8x16"
# 8 and 30 minutes, 80 ms a frame as in Parakeet
LONG_SHAPES = "1x6000,1x22500"
LONG_PROVIDERS = {
    "cpu": "transformers:wav2vec2,lcconformer:cpu+loop",
    "cuda": "transformers:wav2vec2,lcconformer:triton+loop",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--mode", default="inference", choices=["inference", "training", "ops"], help="what to time (default inference)"
    )
    add(
        "--shapes",
        metavar="BxT,...",
        help=f"batch x frames; default {SHAPES['cuda']} on a GPU, {SHAPES['cpu']} on a CPU",
    )
    add("--d-model", type=int, default=256, help="width; heads are 64 wide (default 256)")
    add("--layers", type=int, help="number of layers, N; default 12 on a GPU, 4 on a CPU")
    add("--depth", metavar="K,...", help="loops that lcconformer runs, one row each; default N")
    add("--providers", metavar="NAME[:BACKEND],...", help="implementations to time; default all that can run")
    add(
        "--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU; amp is autocast to bfloat16"
    )
    add("--device", choices=["cpu", "cuda"], help="default cuda if torch can use a GPU")
    add("--threads", type=int, help="CPU threads; default OMP_NUM_THREADS, else one for each core that is there to use")
    add("--seconds", type=float, help="time budget of a case; default 3 on a GPU, 15 on a CPU, but at least 5 rounds")
    add(
        "--contention",
        metavar="N|torch",
        help="time beside other work on the cores: N busy threads, or a PyTorch job with as many threads as this one",
    )
    add("--rounds", type=int, help="run exactly this many rounds, whatever the budget")
    add(
        "--json", type=Path, metavar="F", help="write rows to F as they finish, in place of older rows of the same case"
    )
    add("--plot", type=Path, metavar="DIR", help="write plots of the rows to DIR (PNG)")
    add("--ladder", action="store_true", help="print what each part of the algorithm gains, and the product")
    add(
        "--packed",
        action="store_true",
        help="time packed batches against padded ones; B utterances of at most T frames",
    )
    add("--streams", action="store_true", help="time a chunk of T frames for B streams")
    add("--long", action="store_true", help="time one layer on long audio: other defaults of shapes, layers, providers")
    add(
        "--accelerated",
        action="store_true",
        help="time the encoders of other packages against themselves under accelerate; --providers names some of them",
    )
    add("--compare", metavar="REF", help="time this working tree against commit REF, interleaved")
    add(
        "--import",
        dest="import_from",
        type=Path,
        metavar="OUT",
        help="file the results that bench/gpu.sh wrote to OUT and refresh the README",
    )


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments describe.

    Raises:
        ValueError: a case is impossible, or the device is not there.
    """
    for name in ("d_model", "layers", "threads", "rounds"):
        if getattr(args, name) is not None:
            need_integer("bench", f"--{name.replace('_', '-')}", getattr(args, name), 1, 1 << 20)
    if args.seconds is not None:
        need_number("bench", "--seconds", args.seconds, 0, open=True)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device cuda, but torch sees no CUDA device; leave it out to run on the CPU")
    args.device = device
    layers = args.layers or (1 if args.long else 12 if device == "cuda" else 4)
    depths = [int(k) for k in args.depth.split(",")] if args.depth else [layers]
    args.depths = depths
    modes = [args.mode] if args.mode != "ops" else [f"{op}:{way}" for op in OPS for way in ("forward", "training")]
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    return [
        Case(mode, b, t, args.d_model, layers, depths[0], dtype, device)
        for mode in modes
        for b, t in parse_shapes(args.shapes or _shapes(args))
    ]


def _shapes(args: argparse.Namespace) -> str:
    if args.packed:
        return PACKED_SHAPES
    if args.long:
        return LONG_SHAPES
    return STREAM_SHAPES if args.streams else SHAPES[args.device]


def run(args: argparse.Namespace) -> int:
    if args.import_from is not None:
        from .reports.filing import file_results

        return file_results(args.import_from)
    todo = cases(args)
    check_output("--json", args.json)
    check_output("--plot", args.plot, folder=True)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    beside: contextlib.AbstractContextManager = contextlib.nullcontext()
    if args.contention is not None:
        beside = neighbours(parse_contention(args.contention), torch.get_num_threads())
        print(f"beside {args.contention} (--contention)")
    with beside:
        return _timed(args, todo)


def _timed(args: argparse.Namespace, todo: list[Case]) -> int:
    if args.compare:
        from .runs.compare import compare

        return compare(args.compare, todo, args.seconds, args.rounds)
    if args.ladder:
        from .runs.ladder import ladder

        return ladder(todo, args.seconds, args.rounds)
    if args.accelerated:
        from .runs.accelerated import accelerated

        return accelerated(todo, args.providers, args.json, args.seconds, args.rounds)
    if args.packed or args.streams:
        from .runs import speech

        return (speech.packed if args.packed else speech.streams)(todo, args.json, args.seconds, args.rounds)
    providers = choose(args.providers or (LONG_PROVIDERS[args.device] if args.long else None))
    results = Results(args.json)
    seconds = args.seconds or (3.0 if args.device == "cuda" else 15.0)
    count = f"{len(todo)} case{'s' if len(todo) > 1 else ''}"
    print(f"{device_name(args.device)}; commit {commit()}; {count}, N = {todo[0].layers}, {todo[0].dtype}")
    rows: list[Row] = []
    per_case = len(providers) + 1 + (len(args.depths) - 1) * sum(p.name == "lcconformer" for p in providers)
    with progress_bar(per_case * len(todo)) as bar, Interrupts() as interrupts:

        def step(text: str) -> None:
            interrupts.check()
            bar.set_description_str(text)
            bar.update()

        try:
            for case in todo:
                if args.device == "cpu":
                    bar.write(
                        f"measuring {case}: {seconds:g} s of rounds" if args.rounds is None else f"measuring {case}"
                    )
                rows += run_case(
                    case,
                    providers,
                    results,
                    depths=args.depths,
                    seconds=seconds,
                    rounds=args.rounds,
                    beside=args.contention or "",
                    step=step,
                    say=bar.write,
                )
                interrupts.check()
        finally:
            bar.close()
            # also after an interruption: what is finished counts
            report(rows, results, args)
    return 0 if rows else 1


def report(rows: list[Row], results: Results, args: argparse.Namespace) -> None:
    if not rows:
        print("no case finished")
        return
    print("\n" + case_tables(rows))
    print(
        "\nms: median of interleaved rounds; frames/s: B x T per second; RTF: time over the duration of the speech, 10 ms a "
        "frame; MB: peak memory of one call;\nFLOP/s, GB/s: minimum work per second; of floor: least possible time over the "
        "time, by measured ceilings (" + "; ".join(_ceiling(*item) for item in results.ceilings.items()) + ")"
    )
    if args.mode == "training":
        print("training: forward and backward with dropout 0.1, without the optimiser")
    if notes(rows):
        print(notes(rows))
    if args.json is not None:
        print(f"rows: {args.json}")
    if args.plot is not None:
        from .reports.plots import plot

        for path in plot(rows, results, args.plot):
            print(f"plot: {path}")


def _ceiling(name: str, rates: dict[str, float]) -> str:
    return f"{name}: GEMM {flops_rate(rates['gemm_tflops'])}, copy {number(rates['copy_gb_s'])} GB/s"


def progress_bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("bench needs tqdm; pip install 'lcconformer[bench]'") from error
    return tqdm(
        total=total,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} {desc}",
    )
