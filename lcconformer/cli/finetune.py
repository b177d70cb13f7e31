"""``lcconformer finetune``: train an encoder, pretrained or new, to recognise speech, and measure its error rates."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConformerConfig
from ..data import Corpus, load_corpus
from ..runtime import ProgressBar, check_output
from ..ssl.checkpoint import find_checkpoints, load_checkpoint
from ..ssl.evaluation.output import describe_machine, write_json
from ..ssl.finetuning import (
    AugmentSettings,
    FinetuneSettings,
    Recogniser,
    TaskSettings,
    best_depth,
    calibrate_exit,
    calibrate_search,
    error_rates,
    exit_depths,
    finetune,
    hear_corpus,
    read_corpus,
    search_rates,
    write_ngrams,
)
from ..ssl.finetuning.beam_search import require_flashlight
from ..ssl.finetuning.ngrams import ORDERS
from ..ssl.finetuning.settings import PRECISIONS
from ..ssl.finetuning.units import sentences_of
from ..ssl.model import FeatureSettings, load_model
from ..ssl.pretraining import load_speech
from ..ssl.pretraining.settings import FREE_SETTINGS
from ..validation import need_integer
from .options import (
    EXIT,
    add_depth_options,
    add_encoder_options,
    add_feature_options,
    add_optimizer_options,
    add_option,
    add_run_options,
    contradictions,
    names,
    split_subsampling,
)

__all__ = ["add_arguments", "format_rows", "run", "settings_from"]

_ENCODER = ConformerConfig(input_dim=80, subsampling="stack", subsampling_factor=4)
# option -> (what it is a setting of, name of the field)
_FIELDS = {
    "layers": ("config", "num_layers"),
    "sharing": ("config", "sharing"),
    "conditioning": ("config", "conditioning"),
    "d_model": ("config", "d_model"),
    "heads": ("config", "num_heads"),
    "ffn_dim": ("config", "ffn_dim"),
    "kernel": ("config", "conv_kernel_size"),
    "dropout": ("config", "dropout"),
    "position": ("config", "position"),
    "conv_norm": ("config", "conv_norm"),
    "subsampling": ("config", "subsampling"),
    "mel_bins": ("features", "num_bins"),
    "low_freq": ("features", "low_freq"),
    "high_freq": ("features", "high_freq"),
    "frames": ("tasks", "frames"),
    "phones": ("tasks", "phones"),
    "characters": ("tasks", "characters"),
    "ctc_outputs": ("tasks", "ctc_outputs"),
    "frequency_masks": ("augment", "frequency_masks"),
    "frequency_width": ("augment", "frequency_width"),
    "time_masks": ("augment", "time_masks"),
    "time_width": ("augment", "time_width"),
}
_OWN = [
    f.name for f in dataclasses.fields(FinetuneSettings) if f.name not in ("config", "features", "tasks", "augment")
]
_SPEECH: dict[str, Any] = {"data": None, "splits": (), "test_speakers": (), "validation_speakers": None}


_EXITS = {"exit": "change", "exit_entropy": "entropy"}
"""Exit rules that are calibrated: key of results.json, kind."""


def options_of(settings: FinetuneSettings) -> dict[str, Any]:
    """Options that describe ``settings``: the inverse of :func:`settings_from`."""
    told = {option: getattr(getattr(settings, part), name) for option, (part, name) in _FIELDS.items()}
    told["subsampling"] = f"{settings.config.subsampling}:{settings.config.subsampling_factor}"
    return told | {name: getattr(settings, name) for name in _OWN}


_DEFAULTS = options_of(FinetuneSettings(_ENCODER)) | {"ffn_dim": None}  # follows from the width


_option = functools.partial(add_option, _DEFAULTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "At the end the validation speakers choose the depth, and calibrate an exit rule; the error rates of the test "
        "speakers (without any, of the validation speakers) at every depth are printed and written to results.json in the "
        "folder of the run. Ctrl-C finishes the step, writes a checkpoint and says how to continue."
    )
    several: dict[str, Any] = {"type": names, "metavar": "A,B"}
    group = parser.add_argument_group("speech")
    text = "a LibriSpeech folder tree, or a zip or folder with meta.jsonl; several times for several corpora"
    _option(group, "--data", text, action="append", metavar="PATH")
    _option(group, "--splits", "take only these splits (default: all)", **several)
    _option(
        group, "--test-speakers", "keep these speakers out and measure error rates on them (default: none)", **several
    )
    text = "hold these speakers out to choose the depth (default: some with 5%% of the speech)"
    _option(group, "--validation-speakers", text, **several)
    _option(group, "--batch-seconds", "largest amount of audio in a batch, padding included")
    _option(group, "--workers", "threads that decode audio ahead")

    group = parser.add_argument_group("run")
    _option(group, "--out", "folder for checkpoints, logs and results", metavar="DIR")
    group.add_argument(
        "--resume",
        metavar="DIR",
        help="continue from the newest checkpoint in DIR, which holds all other options: only --device, --workers, "
        "--validate-every, --checkpoint-every, --keep and the place of --data may change. A finished run is measured again",
    )
    text = (
        "start from the encoder of this checkpoint of 'pretrain', or of the folder of a run (default: random weights)"
    )
    group.add_argument("--checkpoint", metavar="PATH", help=text)
    text = "train the heads alone, on the encoder as it is"
    _option(group, "--freeze-encoder", text, action="store_true")
    _option(group, "--freeze-front-end", "first steps in which the front end keeps its weights", metavar="STEPS")
    add_run_options(_option, group, PRECISIONS)
    group.add_argument(
        "--lm-order",
        type=int,
        metavar="N",
        help="estimate N-gram models of phones and characters on the training speech, write them to the folder of the run, "
        "and measure a beam search with them at the chosen depth, too; the validation speakers choose its weights",
    )

    group = parser.add_argument_group("predictions", "weights in the loss; 0: not predicted")
    _option(group, "--frames", "cross-entropy on the aligned phone of each 10 ms frame", metavar="WEIGHT")
    _option(group, "--phones", "CTC on the phones of the alignment", metavar="WEIGHT")
    _option(group, "--characters", "CTC on the transcript", metavar="WEIGHT")
    _option(group, "--ctc-outputs", "CTC outputs per encoder output", metavar="NUMBER")

    group = parser.add_argument_group("depth")
    add_depth_options(_option, group)

    group = parser.add_argument_group("encoder and features", "with --checkpoint, those of the checkpoint")
    add_encoder_options(_option, group)
    add_feature_options(_option, group)

    group = parser.add_argument_group("SpecAugment and optimizer")
    _option(group, "--frequency-masks", "bands of mel bins hidden in each utterance")
    _option(group, "--frequency-width", "largest number of mel bins of a band")
    _option(group, "--time-masks", "spans of frames hidden in each utterance")
    _option(group, "--time-width", "largest number of 10 ms frames of a span")
    add_optimizer_options(_option, group)


def settings_from(given: Mapping[str, Any], start: tuple[ConformerConfig, FeatureSettings] | None) -> FinetuneSettings:
    """Settings of a new run from the options that were given, on the encoder and features of a checkpoint if there is one.

    Raises:
        ValueError: a value out of range, or an option that the checkpoint decides.
    """
    parts: dict[str, dict[str, Any]] = {"config": {}, "features": {}, "tasks": {}, "augment": {}}
    for option, (part, name) in _FIELDS.items():
        if option in given:
            parts[part][name] = given[option]
    if start is not None:
        fixed = [
            f"--{o.replace('_', '-')}" for o, (p, _) in _FIELDS.items() if p in ("config", "features") and o in given
        ]
        if fixed:
            raise ValueError(f"{', '.join(fixed)}: --checkpoint decides the encoder and the features; leave them out")
        config, features = start
    else:
        if "subsampling" in given:
            parts["config"] |= dict(zip(("subsampling", "subsampling_factor"), split_subsampling(given["subsampling"])))
        if "d_model" in given:
            parts["config"].setdefault("ffn_dim", 4 * given["d_model"])
        features = FeatureSettings(**parts["features"])
        config = _ENCODER.replace(input_dim=features.num_bins, **parts["config"])
    return FinetuneSettings(
        config,
        features,
        TaskSettings(**parts["tasks"]),
        AugmentSettings(**parts["augment"]),
        **{name: given[name] for name in _OWN if name in given},
    )


def resumed(given: Mapping[str, Any], path: Path) -> tuple[FinetuneSettings, dict[str, Any]]:
    """Settings and speech of the run that wrote the checkpoint ``path``, updated by the given options that may change.

    Raises:
        ValueError: given options contradict the checkpoint, or it is no checkpoint of this command.
    """
    checkpoint = load_checkpoint(path, prefix=None)
    if "tasks" not in checkpoint.meta:
        raise ValueError(
            f"{path} is a checkpoint of 'pretrain': resume it with that command, or give it as --checkpoint"
        )
    settings = FinetuneSettings.from_checkpoint(checkpoint.meta)
    speech = {**_SPEECH, **(checkpoint.meta.get("speech") or {})}
    if speech["data"] is None and "data" not in given:
        raise ValueError(f"{path} does not say which speech it was trained on: give the --data of the first command")
    was = {**options_of(settings), **{name: speech[name] for name in _SPEECH if name != "data"}}
    changed = contradictions(given, was, FREE_SETTINGS)
    if given.get("checkpoint") is not None:
        changed.append("--checkpoint is given, but the weights are those of the run")
    if changed:
        raise ValueError(f"cannot resume {path} with other options: {'; '.join(changed)}: leave them out")
    settings = dataclasses.replace(settings, **{name: given[name] for name in FREE_SETTINGS if name in given})
    return settings, {**speech, **({"data": given["data"]} if "data" in given else {})}


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    if (args.resume is None) == ("out" not in given):
        raise ValueError("give either --out, the folder of a new run, or --resume, that of an earlier one")
    option, folder = ("--out", Path(given["out"])) if args.resume is None else ("--resume", Path(args.resume))
    check_output(option, folder, folder=True)
    start = None
    if args.resume is not None:
        found = find_checkpoints(folder)
        if not found:
            raise ValueError(f"{folder} has no checkpoint to resume; to start a run, give --data and --out")
        settings, speech = resumed(given, found[-1])
    else:
        if not given.get("data"):
            raise ValueError("--data is missing: give the speech to train on")
        speech = {name: given.get(name, default) for name, default in _SPEECH.items()}
        start = None if args.checkpoint is None else load_model(args.checkpoint)
        settings = settings_from(given, None if start is None else (start.config, start.feature_settings))
    # absolute, so that the run can be resumed from anywhere
    speech = {**speech, "data": [os.path.abspath(path) for path in speech["data"]]}
    train, validation = load_speech(
        speech["data"],
        splits=speech["splits"],
        exclude_speakers=speech["test_speakers"],
        validation_speakers=speech["validation_speakers"],
        seed=settings.seed,
    )
    tests = _test_speech(speech)
    if args.lm_order is not None:
        # before hours of training
        require_flashlight()
        need_integer("finetune", "--lm-order", args.lm_order, ORDERS[0], ORDERS[-1])
        if validation is None:
            raise ValueError("--lm-order needs validation speakers, who choose the weight of the n-grams: name some")
    held = "none" if validation is None else ", ".join(validation.speakers)
    print(f"{train}\nheld out for validation: {held}", file=sys.stderr)
    result = finetune(
        settings, train, validation, out=folder, start=start, resume=args.resume is not None, speech=speech
    )
    print(f"checkpoint: {result.checkpoint}", file=sys.stderr)
    if result.stopped in EXIT:
        again = shlex.join(["lcconformer", "finetune", "--resume", str(folder)])
        print(f"stopped by {result.stopped}; to continue: {again}", file=sys.stderr)
        return EXIT[result.stopped]
    if validation is None and not tests:
        print("no speaker was held out: no error rates", file=sys.stderr)
        return 0
    scores = _measure(result.model, validation, tests)
    if args.lm_order is not None and validation is not None:
        scores["beam_search"] = _search(result.model, train, validation, tests, scores, folder, args.lm_order)
    print(format_rows(scores))
    machine = describe_machine(result.model.features.window.device)
    described = {**result.model.describe(), "settings": settings.describe(), "speech": speech}
    steps = load_checkpoint(result.checkpoint, prefix=None).meta
    progress = {"steps": steps["step"], "epochs": steps["epoch"], "training_seconds": steps["elapsed_s"]}
    print(
        f"wrote {write_json(folder / 'results.json', scores | progress | described | {'machine': machine})}",
        file=sys.stderr,
    )
    return 0


def _test_speech(speech: Mapping[str, Any]) -> list[Corpus]:
    """The speech of the test speakers in each corpus that has some."""
    if not speech["test_speakers"]:
        return []
    corpora = [load_corpus(path) for path in speech["data"]]
    tests = []
    for corpus in corpora:
        speakers = set(corpus.speakers) & set(speech["test_speakers"])
        splits = set(corpus.splits) & set(speech["splits"] or corpus.splits)
        if any(u.speaker in speakers and u.split in splits for u in corpus):
            tests.append(corpus.select(speakers=speakers, splits=splits))
    return tests


def _measure(model: Recogniser, validation: Corpus | None, tests: list[Corpus]) -> dict[str, Any]:
    """Error rates at every depth of the test speech, or of the validation speech, and at what the latter chooses."""
    depths = range(1, model.config.num_layers + 1)
    with ProgressBar("measuring") as bar:
        read = {}
        if validation is not None:
            read["validation"] = read_corpus(model, validation, progress=bar.update)
        if tests:
            read["test"] = [reading for corpus in tests for reading in read_corpus(model, corpus, progress=bar.update)]
    rows = {name: [{"depth": k, **error_rates(readings, k)} for k in depths] for name, readings in read.items()}
    last = [*read][-1]
    scores: dict[str, Any] = {"measured_on": last, "rows": rows[last]}
    if "validation" in read:
        chosen = best_depth(rows["validation"])
        scores |= {"validation_rows": rows["validation"], "chosen_depth": chosen}
        for name, kind in _EXITS.items():
            rule = calibrate_exit(read["validation"], chosen, kind)
            exits = exit_depths(read[last], rule)
            scores[name] = {"rule": dataclasses.asdict(rule), **error_rates(read[last], exits)}
    return scores


def _search(
    model: Recogniser,
    train: Corpus,
    validation: Corpus,
    tests: list[Corpus],
    scores: Mapping[str, Any],
    folder: Path,
    order: int,
) -> dict[str, Any]:
    """Error rates at the chosen depth of a beam search, beside those of the best path, for each of the units."""
    depth = scores["chosen_depth"]
    calibration = hear_corpus(model, validation, depth)
    measured = [one for corpus in tests for one in hear_corpus(model, corpus, depth)] or calibration
    found = {}
    for units in model.units:
        lm = write_ngrams(folder / f"lm-{units}.arpa", sentences_of(train, units), order)
        search = calibrate_search(model, calibration, units, lm)
        found[units] = {
            "depth": depth,
            "lm": lm.name,
            "order": order,
            **{name: getattr(search, name) for name in ("weight", "blank_penalty", "beam")},
            "best_path": search_rates(model, measured, units, None),
            "found": search_rates(model, measured, units, search),
        }
    return found


def format_rows(scores: Mapping[str, Any]) -> str:
    """Format error rates in percent: a line per depth, and one for the exit rule."""
    columns = [name for name in ("frame_accuracy", "per", "cer", "wer") if name in scores["rows"][0]]
    titles = {"frame_accuracy": "frames right", "per": "PER", "cer": "CER", "wer": "WER"}

    def line(label: str, row: Mapping[str, Any]) -> str:
        return f"{label:>8}" + "".join(f"{100 * row[name]:>14.1f}" for name in columns)

    lines = [
        f"percent over {scores['rows'][0]['utterances']} {scores['measured_on']} utterances",
        f"{'depth':>8}" + "".join(f"{titles[name]:>14}" for name in columns),
        *(line(str(row["depth"]), row) for row in scores["rows"]),
    ]
    if "chosen_depth" in scores:
        lines += [
            line(kind, scores[name]) + f"   mean depth {scores[name]['mean_depth']:.2f}"
            for name, kind in _EXITS.items()
        ]
        how = [
            f"no exit by {kind}"
            if rule["kind"] == "fixed"
            else f"exit when the {kind} falls below {rule['threshold']:.4g}"
            for kind, rule in ((kind, scores[name]["rule"]) for name, kind in _EXITS.items())
        ]
        lines.append(f"chosen on validation: depth {scores['chosen_depth']}; {'; '.join(how)}")
    for units, search in scores.get("beam_search", {}).items():
        rates = ", ".join(
            f"{titles[name]} {100 * search['found'][name]:.1f} (best path {100 * search['best_path'][name]:.1f})"
            for name in ("per", "cer", "wer")
            if name in search["found"]
        )
        lines.append(
            f"beam search at depth {search['depth']}, {search['order']}-grams of {units}, weight {search['weight']:g}, blank "
            f"penalty {search['blank_penalty']:g}: {rates}"
        )
    return "\n".join(lines)
