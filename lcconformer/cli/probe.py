"""``lcconformer probe``: how well phones can be read from the hidden states of every depth.

A linear and a one-hidden-layer classifier are trained on the frozen hidden states of each depth, in a window of neighbouring
outputs.  They are scored by frame accuracy over labelled 10 ms frames.  Log-mel features in a window of 11 frames give the
baseline.  Depths are chosen by the accuracy on held-out validation speech, and judged by that on the test speech.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..conversion import quantize
from ..data import PHONES, Corpus
from ..runtime import ProgressBar, check_output
from ..ssl.evaluation.classifiers import PROBES
from ..ssl.evaluation.depth_timing import time_depths
from ..ssl.evaluation.hidden_states import random_init_like
from ..ssl.evaluation.output import describe_machine, write_json
from ..ssl.evaluation.probes import (
    LOG_MEL,
    TOLERANCE,
    ProbeSettings,
    accuracies,
    best_depth,
    probe_model,
    smallest_depth,
    split_speech,
    split_validation,
)
from ..ssl.model import load_model
from .options import add_checkpoint_argument, add_device_argument, names

__all__ = ["add_arguments", "format_table", "parse_depths", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("--train-data", required=True, metavar="D1", help="aligned speech to train the probes on")
    parser.add_argument("--test-data", required=True, metavar="D2", help="aligned speech to score them on; may be D1")
    parser.add_argument("--train-speakers", type=names, metavar="A,B", help="take only these speakers of D1")
    parser.add_argument(
        "--test-speakers",
        type=names,
        metavar="A,B",
        help="take only these speakers of D2; leave them out of pretraining too (pretrain --exclude-speakers)",
    )
    parser.add_argument(
        "--validation-speakers",
        type=names,
        metavar="A,B",
        help="hold these training speakers out to choose the depth by (default: some with 5%% of the training speech)",
    )
    parser.add_argument("--depths", default="all", help="'all' (default), or a list such as 1,2,4; 0 is the front end")
    parser.add_argument("--random-init", action="store_true", help="also probe the same encoder with untrained weights")
    parser.add_argument(
        "--int8", action="store_true", help="also probe the encoder with its weights in 8 bits (lcconformer.quantize)"
    )
    for field, text in (
        ("max_frames", "training frames of 10 ms, in whole utterances drawn at random, kept in memory as float16"),
        ("hidden", "width of the hidden layer of the second probe"),
        ("epochs", "passes over the training frames"),
        ("context", "encoder outputs on each side that a probe sees too"),
        ("seed", "seed of the drawn frames, their order and the initial weights"),
    ):
        default = getattr(ProbeSettings, field)
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=int, default=default, help=f"{text} (default {default})"
        )
    add_device_argument(parser)
    parser.add_argument("--json", metavar="F", help="write rows, settings and machine to this file")


def run(args: argparse.Namespace) -> None:
    check_output("--json", args.json)
    settings = ProbeSettings(args.max_frames, args.hidden, args.epochs, args.context, args.seed)
    model = load_model(args.checkpoint, args.device)
    depths = parse_depths(args.depths, model.config.num_layers)
    train, test = split_speech(args.train_data, args.test_data, args.train_speakers, args.test_speakers)
    train, validation = split_validation(train, args.validation_speakers, args.seed)
    print(f"train: {train}\nvalidation: {validation}\ntest: {test}", file=sys.stderr)
    models = {"checkpoint": model}
    if args.random_init:
        models["random-init"] = random_init_like(model, args.seed)
    if args.int8:
        models["int8"] = copy.deepcopy(model)
        models["int8"].encoder = quantize(model.encoder)
    rows: list[dict[str, Any]] = []
    for number, (name, which) in enumerate(models.items()):
        with ProgressBar(name) as bar:
            rows += probe_model(
                which,
                train,
                validation,
                test,
                depths,
                settings=settings,
                name=name,
                log_mel=number == 0,
                progress=bar.update,
            )
    timed = {name: which for name, which in models.items() if name != "random-init"}
    all_times = time_depths(timed, test, [k for k in depths if k])
    times = all_times["checkpoint"]
    for row in rows:
        own = all_times.get(row["features"])
        row["seconds"] = None if own is None else own.seconds.get(row["depth"])
    chosen = {}
    if times.seconds:
        for probe in PROBES:
            validated = accuracies(rows, "checkpoint", probe, "validation")
            chosen[probe] = {"best": best_depth(validated), "smallest": smallest_depth(validated)}
    print(format_table(rows, list(models), times.audio_seconds))
    for probe, depth in chosen.items():
        test_accuracy = accuracies(rows, "checkpoint", probe)
        print(
            f"{probe} probe, chosen on validation speech: best depth {depth['best']} "
            f"({test_accuracy[depth['best']]:.1%} on the test speech), smallest within {TOLERANCE:.0%} (relative) of it "
            f"{depth['smallest']} ({test_accuracy[depth['smallest']]:.1%})"
        )
    if args.json:
        result = {
            "checkpoint": str(args.checkpoint),
            "train": _describe(train),
            "validation": _describe(validation),
            "test": _describe(test),
            "classes": list(PHONES),
            "settings": dataclasses.asdict(settings),
            "rows": rows,
            "chosen_depth": {"tolerance": TOLERANCE, "kind": "relative", **chosen},
            "timing": {k: v for k, v in dataclasses.asdict(times).items() if k != "seconds"},
            "machine": describe_machine(args.device),
        }
        print(f"wrote {write_json(args.json, result)}", file=sys.stderr)


def parse_depths(text: str, num_layers: int) -> list[int]:
    """Parse depths: ``"all"`` -> 0 ... N; ``"1,2,4"`` -> these, in ascending order.

    Raises:
        ValueError: not a list of depths from 0 to N.
    """
    if text == "all":
        return list(range(num_layers + 1))
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) <= num_layers for part in parts):
        raise ValueError(f"--depths is {text!r}; expected 'all' or depths from 0 to {num_layers} such as 1,2,4")
    return sorted({int(part) for part in parts})


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "utterances": len(corpus),
        "hours": corpus.hours,
        "speakers": list(corpus.speakers),
        "skipped": len(corpus.skipped),
    }


def format_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], audio_seconds: float) -> str:
    """Format accuracies in percent and milliseconds per second of speech: a line per depth, two columns per model."""
    value = {(r["features"], r["depth"], r["probe"]): 100 * r["accuracy"] for r in rows}
    seconds = {r["depth"]: r.get("seconds") for r in rows if r["features"] == names[0]}
    frames = rows[0]["frames"]
    lines = [
        f"phone frame accuracy (%) over {frames:,} test frames, {len(PHONES)} classes",
        f"{'':>8}" + "".join(f"{name:>20}" for name in names),
        f"{'depth':>8}"
        + "".join(f"{p:>{12 if i % 2 == 0 else 8}}" for _ in names for i, p in enumerate(PROBES))
        + "   ms/s",
    ]
    if (LOG_MEL, None, PROBES[0]) in value:
        lines.append(f"{LOG_MEL:>8}" + "".join(f"{value[LOG_MEL, None, p]:>{w}.1f}" for p, w in zip(PROBES, (12, 8))))
    for depth, time in seconds.items():
        cells = "".join(f"{value[name, depth, p]:>{w}.1f}" for name in names for p, w in zip(PROBES, (12, 8)))
        lines.append(f"{depth:>8}{cells}" + (f"{1e3 * time / audio_seconds:>7.2f}" if time else ""))
    lines.append(
        "ms/s: median milliseconds of the encoder per second of speech; depth 0 is the input of the first loop"
    )
    return "\n".join(lines)
