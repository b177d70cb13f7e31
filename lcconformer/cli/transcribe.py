"""``lcconformer transcribe``: print what is said in audio files."""

from __future__ import annotations

import argparse

import torch

from ..data import read_audio
from ..depth import ExitRule
from ..ssl.finetuning import BeamSearch, load_recogniser
from ..ssl.finetuning.model import UNITS
from .options import add_device_argument

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint of 'finetune', or the folder of a run (its newest checkpoint)")
    parser.add_argument("files", nargs="+", metavar="FILE", help="mono 16 kHz audio (.wav, .flac, .ogg, .opus, .mp3)")
    parser.add_argument("--depth", type=int, metavar="K", help="number of loops (default: all)")
    text = "stop looping when the relative change of the hidden state falls below X (results.json of the run has one)"
    parser.add_argument("--exit-threshold", type=float, metavar="X", help=text)
    text = "stop looping when the entropy of the posterior, in nats, falls below X (results.json has one)"
    parser.add_argument("--exit-entropy", type=float, metavar="X", help=text)
    parser.add_argument("--units", choices=UNITS, help="what to spell (default: characters if they were trained)")
    text = "n-grams over the units, in ARPA's or KenLM's format, for a beam search (default: none, the best path)"
    parser.add_argument("--lm", metavar="FILE", help=text)
    text = "weight of the language model (default 1.0; results.json of 'finetune --lm-order' has one)"
    parser.add_argument("--lm-weight", dest="weight", type=float, metavar="W", help=text)
    text = "nats taken off the log posterior of CTC's blank (default 0.0; results.json has one)"
    parser.add_argument("--blank-penalty", type=float, metavar="P", help=text)
    parser.add_argument("--beam", type=int, metavar="N", help="paths that the search keeps (default 32)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    rules = {"--depth": args.depth, "--exit-threshold": args.exit_threshold, "--exit-entropy": args.exit_entropy}
    if len(chosen := [option for option, value in rules.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(chosen)} are given together; choose one")
    rule = None
    if args.exit_threshold is not None:
        rule = ExitRule("change", threshold=args.exit_threshold)
    elif args.exit_entropy is not None:
        rule = ExitRule("entropy", threshold=args.exit_entropy)
    given = {name: getattr(args, name) for name in ("weight", "blank_penalty", "beam")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and args.lm is None:
        raise ValueError("--lm-weight, --blank-penalty and --beam are of a beam search, which needs --lm FILE")
    model = load_recogniser(args.model, args.device)
    units = model.choose_units(args.units)
    search = None if args.lm is None else BeamSearch(model.tokens(units), args.lm, **given)
    for file in args.files:
        audio: torch.Tensor = read_audio(file)
        texts, _ = model.transcribe(
            audio[None].to(args.device), units=units, depth=args.depth, rule=rule, search=search
        )
        print(texts[0] if len(args.files) == 1 else f"{file}\t{texts[0]}")
