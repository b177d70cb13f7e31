"""``python -m lcconformer probe``: what the features of every depth know of phones.

A linear and a one-hidden-layer classifier are trained on frozen features of each depth and scored by frame accuracy over
labelled 10 ms frames, with the log-mel features themselves (one frame, no context) as the floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..data import PHONES, Corpus, load_corpus
from ..runtime import ProgressBar
from ..ssl.evaluation.classifiers import PROBES
from ..ssl.evaluation.depth_timing import time_depths
from ..ssl.evaluation.hidden_states import random_init_like
from ..ssl.evaluation.output import add_device_argument, describe_machine, write_json
from ..ssl.evaluation.probes import LOG_MEL, TOLERANCE, ProbeSettings, accuracies, probe_model, smallest_depth
from ..ssl.model import load_model

__all__ = ["add_arguments", "format_table", "parse_depths", "run", "split_speech"]


def split_speech(
    train_path: str,
    test_path: str,
    train_speakers: Collection[str] | None = None,
    test_speakers: Collection[str] | None = None,
) -> tuple[Corpus, Corpus]:
    """Training and test corpus that share no utterance.

    Different corpora are taken whole unless speakers are named.  One corpus is separated by speaker (naming one side leaves
    the other speakers to the other side), or else by its own splits ``train`` and ``test``.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`~lcconformer.data.load_corpus`; or one corpus with nothing to
            separate it by, or a speaker or utterance on both sides.
    """
    train = load_corpus(train_path)
    if os.path.realpath(train_path) != os.path.realpath(test_path):
        test = load_corpus(test_path)
        train = train.select(speakers=train_speakers) if train_speakers else train
        test = test.select(speakers=test_speakers) if test_speakers else test
    elif train_speakers or test_speakers:
        both = sorted(set(train_speakers or ()) & set(test_speakers or ()))
        if both:
            raise ValueError(f"speaker {', '.join(both)} is in both --train-speakers and --test-speakers")
        corpus = train
        train = corpus.select(speakers=train_speakers or None, exclude_speakers=test_speakers or ())
        test = corpus.select(speakers=test_speakers or None, exclude_speakers=train_speakers or ())
    elif {"train", "test"} <= set(train.splits):
        train, test = train.select(splits=["train"]), train.select(splits=["test"])
    else:
        raise ValueError(
            f"training and test data are the same corpus, {train.name}, which has no splits 'train' and 'test': name "
            f"--test-speakers (it has {', '.join(train.speakers)}), or give another --test-data"
        )
    seen = {(u.id, u.num_samples, u.text) for u in train}
    twice = [u.id for u in test if (u.id, u.num_samples, u.text) in seen]
    if twice:
        raise ValueError(
            f"{len(twice)} utterances are in both training and test data ({', '.join(twice[:3])}, ...): "
            "separate them with --train-speakers and --test-speakers"
        )
    return train, test


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="a checkpoint of 'pretrain', or the folder of a run (its newest one)"
    )
    parser.add_argument("--train-data", required=True, metavar="D1", help="aligned speech the probes are trained on")
    parser.add_argument("--test-data", required=True, metavar="D2", help="aligned speech they are scored on; may be D1")
    parser.add_argument("--train-speakers", metavar="A,B", help="only these speakers of D1")
    parser.add_argument(
        "--test-speakers",
        metavar="A,B",
        help="only these speakers of D2; leave them out of pretraining too (pretrain --exclude-speakers)",
    )
    parser.add_argument("--depths", default="all", help="'all' (default), or a list such as 1,2,4; 0 is the front end")
    parser.add_argument("--random-init", action="store_true", help="also probe the same encoder with untrained weights")
    for field, text in (
        ("max_frames", "training frames, drawn at random and kept in memory as float16"),
        ("hidden", "width of the hidden layer of the second probe"),
        ("epochs", "passes over the training frames"),
        ("seed", "of frames drawn, their order, and initial weights"),
    ):
        default = getattr(ProbeSettings, field)
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=int, default=default, help=f"{text} (default {default})"
        )
    add_device_argument(parser)
    parser.add_argument("--json", metavar="F", help="write rows, settings and machine to this file")


def run(args: argparse.Namespace) -> None:
    settings = ProbeSettings(args.max_frames, args.hidden, args.epochs, args.seed)
    model = load_model(args.checkpoint, args.device)
    depths = parse_depths(args.depths, model.config.num_layers)
    train, test = split_speech(
        args.train_data, args.test_data, parse_names(args.train_speakers), parse_names(args.test_speakers)
    )
    print(f"train: {train}\ntest:  {test}", file=sys.stderr)
    models = {"checkpoint": model}
    if args.random_init:
        models["random-init"] = random_init_like(model, args.seed)
    rows: list[dict[str, Any]] = []
    for number, (name, which) in enumerate(models.items()):
        with ProgressBar(name) as bar:
            rows += probe_model(
                which, train, test, depths, settings=settings, name=name, log_mel=number == 0, progress=bar.update
            )
    times = time_depths({"checkpoint": model}, test, [k for k in depths if k])["checkpoint"]
    for row in rows:
        row["seconds"] = times.seconds.get(row["depth"]) if row["features"] == "checkpoint" else None
    chosen = {p: smallest_depth(accuracies(rows, "checkpoint", p)) for p in PROBES} if times.seconds else {}
    print(format_table(rows, list(models), times.audio_seconds))
    for probe, depth in chosen.items():
        print(f"smallest depth within {TOLERANCE:.0%} (relative) of the best, {probe} probe: {depth}")
    if args.json:
        result = {
            "checkpoint": str(args.checkpoint),
            "train": _describe(train),
            "test": _describe(test),
            "classes": list(PHONES),
            "settings": dataclasses.asdict(settings),
            "rows": rows,
            "smallest_depth": {"tolerance": TOLERANCE, "kind": "relative", **chosen},
            "timing": {k: v for k, v in dataclasses.asdict(times).items() if k != "seconds"},
            "machine": describe_machine(args.device),
        }
        print(f"wrote {write_json(args.json, result)}", file=sys.stderr)


def parse_depths(text: str, num_layers: int) -> list[int]:
    """``"all"`` -> 0 ... N; ``"1,2,4"`` -> those, ascending.

    Raises:
        ValueError: not a list of depths from 0 to N.
    """
    if text == "all":
        return list(range(num_layers + 1))
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) <= num_layers for part in parts):
        raise ValueError(f"--depths is {text!r}; expected 'all' or depths from 0 to {num_layers} such as 1,2,4")
    return sorted({int(part) for part in parts})


def parse_names(text: str | None) -> list[str]:
    """``"a,b"`` -> ``["a", "b"]``; None -> nothing."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "utterances": len(corpus),
        "hours": corpus.hours,
        "speakers": list(corpus.speakers),
        "skipped": len(corpus.skipped),
    }


def format_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], audio_seconds: float) -> str:
    """Frame accuracies in percent, a line per depth, a pair of columns per model, and milliseconds per second of speech."""
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
