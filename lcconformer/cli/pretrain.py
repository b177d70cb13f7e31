"""``lcconformer pretrain``: self-supervised pretraining on your speech."""

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

import torch.distributed as dist

from ..config import ConformerConfig
from ..runtime import check_output
from ..ssl.checkpoint import Checkpoint, checkpoint_path, find_checkpoints, load_checkpoint
from ..ssl.model import FeatureSettings, check_model
from ..ssl.objectives import OBJECTIVES, ObjectiveSettings
from ..ssl.pretraining import PretrainSettings, load_speech, pretrain
from ..ssl.pretraining.distributed import join_ranks
from ..ssl.pretraining.settings import FREE_SETTINGS, PRECISIONS
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

__all__ = ["add_arguments", "run", "settings_from"]


def options_of(settings: PretrainSettings) -> dict[str, Any]:
    """Options that describe ``settings``: the inverse of :func:`settings_from`."""
    config, features, objective = settings.config, settings.features, settings.objective
    others = dataclasses.asdict(settings)
    return {
        **{name: others[name] for name in others if name not in ("config", "features", "objective")},
        "layers": config.num_layers,
        "sharing": config.sharing,
        "conditioning": config.conditioning,
        "d_model": config.d_model,
        "heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "kernel": config.conv_kernel_size,
        "dropout": config.dropout,
        "position": config.position,
        "conv_norm": config.conv_norm,
        "subsampling": f"{config.subsampling}:{config.subsampling_factor}",
        "mel_bins": features.num_bins,
        "low_freq": features.low_freq,
        "high_freq": features.high_freq,
        "objective": objective.kind,
        "mask_fraction": objective.fraction,
        "mask_span": objective.span,
        "codebook_size": objective.codebook_size,
    }


_DEFAULTS: dict[str, Any] = {
    **options_of(PretrainSettings(ConformerConfig(input_dim=80, subsampling="stack", subsampling_factor=4))),
    # these follow from other options
    "ffn_dim": None,
    "mask_fraction": None,
    "mask_span": None,
}
_SPEECH: dict[str, Any] = {"data": None, "splits": (), "exclude_speakers": (), "validation_speakers": None}


_option = functools.partial(add_option, _DEFAULTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ctrl-C finishes the step, writes a checkpoint and says how to continue. Several GPUs: torchrun --nproc-per-node 8 -m "
        "lcconformer pretrain ... (batches and accumulation are then per GPU)."
    )
    group = parser.add_argument_group("speech")
    text = "a LibriSpeech folder tree, or a zip or folder with meta.jsonl; several times for several corpora"
    _option(group, "--data", text, action="append", metavar="PATH")
    several: dict[str, Any] = {"type": names, "metavar": "A,B"}
    _option(group, "--splits", "take only these splits (default: all)", **several)
    _option(group, "--exclude-speakers", "keep these speakers out, for a later test (default: none)", **several)
    text = "hold these speakers out for the validation loss (default: some with 5%% of the speech)"
    _option(group, "--validation-speakers", text, **several)
    _option(group, "--batch-seconds", "largest amount of audio in a batch, padding included")
    _option(group, "--crop-seconds", "cut longer utterances to this")
    _option(group, "--workers", "threads that decode audio ahead")

    group = parser.add_argument_group("run")
    _option(group, "--out", "folder for checkpoints and logs", metavar="DIR")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="DIR",
        help="continue from the newest checkpoint in DIR, by default that of --out. The checkpoint holds all other options: "
        "only --device, --workers, --validate-every, --checkpoint-every, --keep and the place of --data may change",
    )
    add_run_options(_option, group, PRECISIONS)

    group = parser.add_argument_group("depth")
    add_depth_options(_option, group)
    text = "with --depth sandwich: weight of the distance of shallow states from the deepest"
    _option(group, "--distill", text, metavar="WEIGHT")

    group = parser.add_argument_group("encoder")
    add_encoder_options(_option, group)

    group = parser.add_argument_group("features")
    add_feature_options(_option, group)

    group = parser.add_argument_group("objective and optimizer")
    text = "reconstruction: L1 on masked frames; best_rq: cross-entropy on random-projection labels"
    _option(group, "--objective", text, choices=OBJECTIVES)
    _option(group, "--mask-fraction", "masked part of the frames (default: 0.15, best_rq 0.4)", type=float)
    _option(group, "--mask-span", "frames of a masked span (default: 7, best_rq 40)", type=int)
    _option(group, "--codebook-size", "number of labels of best_rq")
    add_optimizer_options(_option, group)
    _option(group, "--accumulate", "batches of a step")


def settings_from(args: argparse.Namespace) -> PretrainSettings:
    """Settings of a new run, with defaults for the options that were not given.

    Raises:
        ValueError: a value out of range.
    """
    told = argparse.Namespace(**{**_DEFAULTS, **vars(args)})
    kind, factor = split_subsampling(told.subsampling)
    config = ConformerConfig(
        d_model=told.d_model,
        num_heads=told.heads,
        ffn_dim=4 * told.d_model if told.ffn_dim is None else told.ffn_dim,
        num_layers=told.layers,
        conv_kernel_size=told.kernel,
        dropout=told.dropout,
        input_dim=told.mel_bins,
        subsampling=kind,
        subsampling_factor=factor,
        position=told.position,
        conv_norm=told.conv_norm,
        sharing=told.sharing,
        conditioning=told.conditioning,
    )
    others = [f.name for f in dataclasses.fields(PretrainSettings) if f.name not in ("config", "features", "objective")]
    return PretrainSettings(
        config=config,
        features=FeatureSettings(told.mel_bins, told.low_freq, told.high_freq),
        objective=ObjectiveSettings(told.objective, told.mask_fraction, told.mask_span, told.codebook_size),
        **{name: getattr(told, name) for name in others},
    )


def resumed(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[PretrainSettings, dict[str, Any]]:
    """Settings and speech of the run that wrote ``checkpoint``, updated by the given options that may change.

    Raises:
        ValueError: given options contradict the checkpoint, or it does not say where its speech is.
    """
    given = vars(args)
    settings = PretrainSettings.from_checkpoint(checkpoint.meta)
    check_model(checkpoint)
    stored = checkpoint.meta.get("speech")
    if stored is None and not given.get("data"):
        raise ValueError(
            f"{checkpoint.path} does not say which speech it was trained on: give the --data of the first command, and its "
            "--splits and speakers if it had any"
        )
    speech = {**_SPEECH, **(stored or {})}
    was = {**options_of(settings), **({name: speech[name] for name in _SPEECH if name != "data"} if stored else {})}
    changed = contradictions(given, was, FREE_SETTINGS)
    if changed:
        raise ValueError(
            f"cannot resume {checkpoint.path} with other options: {'; '.join(changed)}: leave them out, or choose another "
            "--out for a new run"
        )
    settings = dataclasses.replace(settings, **{name: given[name] for name in FREE_SETTINGS if name in given})
    return settings, {**speech, **{name: given[name] for name in _SPEECH if name in given}}


def run_folder(args: argparse.Namespace) -> Path:
    """Folder of the run, from ``--out`` or ``--resume DIR``.

    Raises:
        ValueError: there is no folder, or there are two.
    """
    out, resume = vars(args).get("out"), args.resume
    if isinstance(resume, str):
        if out is not None and os.path.realpath(out) != os.path.realpath(resume):
            raise ValueError(f"--out is {out} but --resume is {resume}: give one of them, or the same folder")
        check_output("--resume", resume, folder=True)
        return Path(resume)
    if out is None:
        raise ValueError("--out is missing: give the folder for checkpoints and logs")
    check_output("--out", out, folder=True)
    return Path(out)


def _launcher() -> list[str]:
    if dist.is_torchelastic_launched():
        return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"]
    return ["python", "-m"]


def _plan(args: argparse.Namespace, folder: Path) -> tuple[PretrainSettings, Mapping[str, Any], Path | None]:
    """Settings, speech, and the checkpoint to resume from, if there is one."""
    found = find_checkpoints(folder) if args.resume else []
    if found:
        return *resumed(args, load_checkpoint(found[-1], prefix=None)), found[-1]
    speech = {name: getattr(args, name, default) for name, default in _SPEECH.items()}
    if not speech["data"]:
        example = checkpoint_path("", 500).name
        nothing = f"{folder} has no checkpoint to resume (files like {example}); to start a run, give --data"
        raise ValueError(nothing if args.resume else "--data is missing: give the speech to train on")
    return settings_from(args), speech, None


def run(args: argparse.Namespace) -> int:
    folder = run_folder(args)
    settings, speech, checkpoint = _plan(args, folder)
    # absolute, so that the run can be resumed from anywhere
    speech = {**speech, "data": [os.path.abspath(path) for path in speech["data"]]}
    ranks = join_ranks(settings.device)
    train, validation = load_speech(
        speech["data"],
        splits=speech["splits"],
        exclude_speakers=speech["exclude_speakers"],
        validation_speakers=speech["validation_speakers"],
        seed=settings.seed,
    )
    if ranks.first:
        model = settings.build_model()
        held = "none" if validation is None else ", ".join(validation.speakers)
        print(
            f"{train}\nheld out for validation: {held}\n{model.encoder.summary()}\n"
            f"loops a step: {settings.sampler().mean_depth(settings.steps):.2f} of {settings.config.num_layers}"
        )
        if args.resume:
            print(f"resuming {checkpoint}" if checkpoint else f"no checkpoint in {folder} yet: starting at step 1")
    result = pretrain(settings, train, validation, out=folder, resume=bool(args.resume), speech=speech)
    if ranks.first:
        print(f"checkpoint: {result.checkpoint}")
        if result.stopped in EXIT:
            again = shlex.join([*_launcher(), "lcconformer", "pretrain", "--resume", str(folder)])
            print(f"stopped by {result.stopped}; to continue: {again}", file=sys.stderr)
    return EXIT.get(result.stopped, 0)
