"""``lcconformer reproduce``: the paper's comparison, from training to report, in one command that can be interrupted."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import torch

from ..runtime import check_output
from ..ssl.reproduction import MODELS, PARTS, PRESETS, Stopped, load_reproduction_speech, plan_runs, reproduce
from .options import EXIT, names

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {model.name:<9}{model.text}" for model in MODELS.values())
    parser.epilog = (
        f"models:\n{listed}\n\n"
        "DIR gets report.html (one file, plots inside), report.md, and a folder per run.  A run that is complete is not\n"
        "repeated, whatever else is asked for later; Ctrl-C keeps what was trained, and the same command goes on.\n"
        "Under torchrun only the pretrainings run; the same command without it does the rest."
    )
    text = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", required=True, choices=PRESETS, help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the report")
    text = "a LibriSpeech folder tree, or a zip or folder with meta.jsonl; several times for several corpora"
    parser.add_argument("--data", required=True, action="append", metavar="PATH", help=text)
    text = "more speech for pretraining; several times for several corpora"
    parser.add_argument("--pretrain-data", action="append", default=[], metavar="PATH", help=text)
    text = "speakers to test on (default: those of the splits test, or test-clean)"
    parser.add_argument("--test-speakers", type=names, default=(), metavar="A,B", help=text)
    text = "speakers to choose depths by (default: the splits dev or val, dev-clean, or some with 5%% of the speech)"
    parser.add_argument("--validation-speakers", type=names, default=(), metavar="A,B", help=text)
    parser.add_argument("--seeds", type=int, metavar="S", help="seeds 0 ... S - 1 (default: that of the preset)")
    text = "models to compare, A and C among them (default: those of the preset)"
    parser.add_argument("--models", type=names, default=(), metavar="A,C", help=text)
    text = f"do these parts only, of {','.join(PARTS)} (default: both)"
    parser.add_argument("--parts", type=names, default=PARTS, metavar="PART", help=text)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    text = "add runs of this commit of the package to those of another"
    parser.add_argument("--mix-commits", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    check_output("--out", args.out, folder=True)
    preset = PRESETS[args.preset]
    speech = load_reproduction_speech(
        args.data,
        test_speakers=args.test_speakers,
        validation_speakers=args.validation_speakers,
        more=args.pretrain_data,
    )
    asked = {"models": args.models, "seeds": args.seeds, "parts": args.parts, "device": args.device}
    first = os.environ.get("RANK", "0") == "0"
    if first:
        roles = speech.describe()
        shown = ", ".join(
            f"{name} {part['hours']:.2f} h of {part['speakers']} speakers" for name, part in roles.items()
        )
        print(f"{shown}\n{len(plan_runs(preset, speech, **asked))} runs in {args.out}", file=sys.stderr)
    again = shlex.join(["lcconformer", *sys.argv[1:]])
    try:
        report = reproduce(preset, speech, args.out, **asked, mix_commits=args.mix_commits, command=_shown(args))
    except Stopped as stopped:
        if first:
            print(f"stopped by {stopped}; to continue: {again}", file=sys.stderr)
        return EXIT[str(stopped)]
    except KeyboardInterrupt:
        print(f"interrupted; to continue: {again}", file=sys.stderr)
        return 130
    if first:
        print(
            f"report: {report}"
            if report
            else "the pretrainings are complete; the rest needs one process, without torchrun"
        )
    return 0


def _shown(args: argparse.Namespace) -> str:
    """The command for the report: with the names of files, not with their places."""
    words = ["lcconformer", "reproduce", "--preset", args.preset]
    for option, paths in (("--data", args.data), ("--pretrain-data", args.pretrain_data)):
        for path in paths:
            words += [option, os.path.basename(os.path.normpath(path))]
    for option in ("test_speakers", "validation_speakers", "models"):
        if given := getattr(args, option):
            words += [f"--{option.replace('_', '-')}", ",".join(given)]
    if args.seeds is not None:
        words += ["--seeds", str(args.seeds)]
    if args.parts != PARTS:
        words += ["--parts", ",".join(args.parts)]
    if args.device is not None:
        words += ["--device", args.device]
    if args.mix_commits:
        words.append("--mix-commits")
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()} "
    return threads + shlex.join([*words, "--out", "DIR"])
