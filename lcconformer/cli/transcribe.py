"""``lcconformer transcribe``: print what is said in audio files."""

from __future__ import annotations

import argparse

import torch

from ..data import read_audio
from ..depth import ExitRule
from ..ssl.finetuning import load_recogniser
from ..ssl.finetuning.model import UNITS
from .options import add_device_argument

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint of 'finetune', or the folder of a run (its newest checkpoint)")
    parser.add_argument("files", nargs="+", metavar="FILE", help="mono 16 kHz audio (.wav, .flac, .ogg, .opus, .mp3)")
    parser.add_argument("--depth", type=int, metavar="K", help="number of loops (default: all)")
    text = "stop looping when the relative change of the hidden state falls below X (results.json of the run has one)"
    parser.add_argument("--exit-threshold", type=float, metavar="X", help=text)
    parser.add_argument("--units", choices=UNITS, help="what to spell (default: characters if they were trained)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.exit_threshold is not None and args.depth is not None:
        raise ValueError("--depth and --exit-threshold are both given; choose one")
    rule = None if args.exit_threshold is None else ExitRule("change", threshold=args.exit_threshold)
    model = load_recogniser(args.model, args.device)
    units = model.choose_units(args.units)
    for file in args.files:
        audio: torch.Tensor = read_audio(file)
        texts, _ = model.transcribe(audio[None].to(args.device), units=units, depth=args.depth, rule=rule)
        print(texts[0] if len(args.files) == 1 else f"{file}\t{texts[0]}")
