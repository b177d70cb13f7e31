"""``python -m lcconformer pretrain``: self-supervised pretraining from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from typing import Any

import torch.distributed as dist

from ..config import ConformerConfig
from ..ssl.checkpoint import find_checkpoints
from ..ssl.model import FeatureSettings
from ..ssl.objectives import OBJECTIVES, ObjectiveSettings
from ..ssl.pretraining.distributed import join_ranks
from ..ssl.pretraining.run import pretrain
from ..ssl.pretraining.settings import PRECISIONS, PretrainSettings
from ..ssl.pretraining.speech import load_speech

__all__ = ["add_arguments", "run"]

DEPTHS = ("uniform", "fixed", "curriculum", "log_normal", "sandwich")
_EXIT = {"SIGINT": 130, "SIGTERM": 143}


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _option(group: argparse._ArgumentGroup, name: str, default: Any, text: str, **more: Any) -> None:
    """An option whose help ends with its default, if it has one, and whose type is that of the default."""
    if default not in (None, ()):
        text = f"{text} (default: {default})"
        more.setdefault("type", type(default))
    group.add_argument(name, default=default, help=text, **more)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Ctrl-C finishes the step, writes a checkpoint and says how to go on. Several GPUs: torchrun --nproc-per-node 8 -m "
        "lcconformer pretrain ... (batches and accumulation are then per GPU)."
    )
    default = PretrainSettings(ConformerConfig(input_dim=80))
    config = default.config

    group = parser.add_argument_group("speech")
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="PATH",
        help="a LibriSpeech folder tree, or a zip or folder with meta.jsonl; several times for several corpora",
    )
    names: dict[str, Any] = {"type": _names, "metavar": "A,B"}
    _option(group, "--splits", (), "take only these splits (default: all)", **names)
    _option(group, "--exclude-speakers", (), "keep these speakers out, for a later test (default: none)", **names)
    text = "hold these speakers out for the validation loss (default: some with 5%% of the speech)"
    _option(group, "--validation-speakers", None, text, **names)
    _option(group, "--batch-seconds", default.batch_seconds, "padded audio of a batch, at most")
    _option(group, "--crop-seconds", default.crop_seconds, "cut longer utterances to this")
    _option(group, "--workers", default.workers, "threads that decode audio ahead")

    group = parser.add_argument_group("run")
    group.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints and logs")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    _option(group, "--steps", default.steps, "optimizer steps; the learning rate falls to zero at the last")
    text = "end after this time, the learning rate following the clock (default: no limit)"
    _option(group, "--max-minutes", None, text, type=float)
    _option(group, "--device", None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    _option(group, "--precision", default.precision, "of matrix products", choices=PRECISIONS)
    _option(group, "--seed", default.seed, "of everything random")
    _option(group, "--validate-every", default.validate_every, "steps between validations; one more at the end")
    _option(group, "--checkpoint-every", default.checkpoint_every, "steps between checkpoints; one more at the end")
    _option(group, "--keep", default.keep, "newest checkpoints kept")

    group = parser.add_argument_group("depth")
    _option(group, "--layers", config.num_layers, "N, loops of a full run")
    text = (
        "loops of a training step: uniform over MIN ... N; fixed N; curriculum, MIN ... a growing maximum; log_normal, around "
        "the middle; sandwich, N, MIN and a random one together"
    )
    _option(group, "--depth", default.depth, text, choices=DEPTHS)
    _option(group, "--min-depth", default.min_depth, "fewest loops of a step", metavar="MIN")
    text = "with --depth sandwich: weight of the distance of shallow states from the deepest"
    _option(group, "--distill", default.distill, text, metavar="WEIGHT")
    text = "which depths share weights: all, none, sequence:M, cycle:M, middle_cycle:M or prelude_core_coda:P,M,C"
    _option(group, "--sharing", config.sharing, text)
    text = "what tells shared depths apart: layer_norm, step, film, lora (default: nothing)"
    _option(group, "--conditioning", (), text, **names)

    group = parser.add_argument_group("encoder")
    _option(group, "--d-model", config.d_model, "width")
    _option(group, "--heads", config.num_heads, "attention heads")
    _option(group, "--ffn-dim", None, "width inside the feed-forward modules (default: 4 x width)", type=int)
    _option(group, "--kernel", config.conv_kernel_size, "of the depthwise convolution, odd")
    _option(group, "--dropout", config.dropout, "on every branch")
    _option(group, "--position", config.position, "of attention: relative, rotary or none")
    _option(group, "--conv-norm", config.conv_norm, "in the convolution module: layer, batch, group or none")
    text = "frames merged into one: none, stack:FACTOR, conv:2 or conv:4"
    _option(group, "--subsampling", "stack:4", text, metavar="KIND[:FACTOR]")

    group = parser.add_argument_group("features")
    _option(group, "--mel-bins", default.features.num_bins, "log-mel filters")
    _option(group, "--low-freq", default.features.low_freq, "lower edge in Hz")
    _option(group, "--high-freq", default.features.high_freq, "upper edge in Hz, inside the band of all the speech")

    group = parser.add_argument_group("objective and optimizer")
    text = "reconstruction: L1 on masked frames; best_rq: cross-entropy on random-projection labels"
    _option(group, "--objective", default.objective.kind, text, choices=OBJECTIVES)
    text = "masked part of the frames (default: 0.15, best_rq 0.4)"
    _option(group, "--mask-fraction", None, text, type=float)
    _option(group, "--mask-span", None, "frames of a masked span (default: 7, best_rq 40)", type=int)
    _option(group, "--codebook-size", default.objective.codebook_size, "labels of best_rq")
    _option(group, "--learning-rate", default.learning_rate, "at its peak")
    _option(group, "--warmup", default.warmup, "part of the run in which it rises")
    _option(group, "--weight-decay", default.weight_decay, "of matrices")
    _option(group, "--clip", default.clip, "largest norm of the gradient")
    _option(group, "--accumulate", default.accumulate, "batches of a step")


def settings_from(args: argparse.Namespace) -> PretrainSettings:
    """Settings as told on the command line.

    Raises:
        ValueError: a value out of range.
    """
    kind, colon, factor = args.subsampling.partition(":")
    if colon and not factor.isdecimal():
        raise ValueError(f"--subsampling is {args.subsampling!r}; expected none, stack:FACTOR, conv:2 or conv:4")
    config = ConformerConfig(
        d_model=args.d_model,
        num_heads=args.heads,
        ffn_dim=4 * args.d_model if args.ffn_dim is None else args.ffn_dim,
        num_layers=args.layers,
        conv_kernel_size=args.kernel,
        dropout=args.dropout,
        input_dim=args.mel_bins,
        subsampling=kind,
        subsampling_factor=int(factor or 1),
        position=args.position,
        conv_norm=args.conv_norm,
        sharing=args.sharing,
        conditioning=args.conditioning,
    )
    others = [f.name for f in dataclasses.fields(PretrainSettings) if f.name not in ("config", "features", "objective")]
    return PretrainSettings(
        config=config,
        features=FeatureSettings(args.mel_bins, args.low_freq, args.high_freq),
        objective=ObjectiveSettings(args.objective, args.mask_fraction, args.mask_span, args.codebook_size),
        **{name: getattr(args, name) for name in others},
    )


def _launcher() -> list[str]:
    if dist.is_torchelastic_launched():
        return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"]
    return ["python", "-m"]


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    ranks = join_ranks(settings.device)
    train, validation = load_speech(
        args.data,
        splits=args.splits,
        exclude_speakers=args.exclude_speakers,
        validation_speakers=args.validation_speakers,
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
            found = find_checkpoints(args.out)
            print(f"going on from {found[-1]}" if found else f"no checkpoint in {args.out} yet: starting at step 1")
    result = pretrain(settings, train, validation, out=args.out, resume=args.resume)
    if ranks.first:
        print(f"checkpoint: {result.checkpoint}")
        if result.stopped in _EXIT:
            command = shlex.join([*_launcher(), "lcconformer", *sys.argv[1:]])
            again = command if args.resume else f"{command} --resume"
            print(f"stopped by {result.stopped}; to go on: {again}", file=sys.stderr)
    return _EXIT.get(result.stopped, 0)
