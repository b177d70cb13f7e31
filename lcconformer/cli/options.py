"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..ssl.pretraining.optim import OPTIMIZERS

__all__ = [
    "EXIT",
    "add_checkpoint_argument",
    "add_depth_options",
    "add_device_argument",
    "add_encoder_options",
    "add_feature_options",
    "add_optimizer_options",
    "add_option",
    "add_run_options",
    "contradictions",
    "names",
    "split_subsampling",
]

EXIT = {"SIGINT": 130, "SIGTERM": 143}
"""Exit status of a training that was stopped by a signal."""
_DEPTHS = ("uniform", "fixed", "curriculum", "log_normal", "sandwich", "layer_drop")


def names(text: str) -> tuple[str, ...]:
    """Split names, ``"a, b"`` -> ``("a", "b")``; serves as the type of an argument."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint``, a file or the folder of a run."""
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint of 'pretrain', or the folder of a run (its newest checkpoint)"
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, which is checked when the arguments are parsed."""

    def device(text: str) -> torch.device:
        try:
            chosen = torch.device(text)
        except RuntimeError:
            chosen = None
        if chosen is None or chosen.type not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu, cuda or cuda:N")
        if chosen.type == "cuda" and not (chosen.index or 0) < torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text!r} is not there: {torch.cuda.device_count()} CUDA devices; try cpu"
            )
        return chosen

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help=f"cpu, cuda or cuda:N (default {default})")


# --- training --------------------------------------------------------------------------------------------------------

Option = Callable[..., None]
"""``add_option`` with the defaults of a command."""


def add_option(defaults: Mapping[str, Any], group: argparse._ArgumentGroup, name: str, text: str, **more: Any) -> None:
    """Add an option that is absent from the parsed arguments unless given; its help ends with its default, if any."""
    default = defaults.get(name[2:].replace("-", "_"))
    if default not in (None, ()) and default is not False:
        text = f"{text} (default: {default})"
        more.setdefault("type", type(default))
    group.add_argument(name, default=argparse.SUPPRESS, help=text, **more)


def add_run_options(option: Option, group: argparse._ArgumentGroup, precisions: Collection[str]) -> None:
    """Add what says how long a training runs, where, and what it writes when."""
    option(group, "--steps", "optimizer steps; the learning rate falls to zero at the last")
    text = "end after this time, the learning rate following the clock (default: no limit)"
    option(group, "--max-minutes", text, type=float)
    option(group, "--device", "cpu, cuda or cuda:N (default: cuda if there is one)")
    option(group, "--precision", "precision of matrix products", choices=precisions)
    option(group, "--seed", "seed of everything random")
    option(group, "--validate-every", "steps between validations; one more at the end")
    option(group, "--checkpoint-every", "steps between checkpoints; one more at the end")
    option(group, "--keep", "number of newest checkpoints to keep")


def add_depth_options(option: Option, group: argparse._ArgumentGroup) -> None:
    """Add the loops and what they share."""
    option(group, "--layers", "N, loops of a full run")
    text = (
        "loops of a training step: uniform over MIN ... N; fixed N; curriculum, MIN ... a growing maximum; log_normal, around "
        "the middle; sandwich, N, MIN and a random one together; layer_drop, as many as uniform, but any of the layers, which "
        "must not be shared"
    )
    option(group, "--depth", text, choices=_DEPTHS)
    option(group, "--min-depth", "fewest loops of a step", metavar="MIN")
    text = "which depths share weights: all, none, sequence:M, cycle:M, middle_cycle:M or prelude_core_coda:P,M,C"
    option(group, "--sharing", text)
    text = "what tells shared depths apart: layer_norm, step, film, lora (default: nothing)"
    option(group, "--conditioning", text, type=names, metavar="A,B")


def add_encoder_options(option: Option, group: argparse._ArgumentGroup) -> None:
    """Add the sizes and kinds of a layer and of the front end."""
    option(group, "--d-model", "width")
    option(group, "--heads", "attention heads")
    option(group, "--ffn-dim", "width inside the feed-forward modules (default: 4 x width)", type=int)
    option(group, "--kernel", "width of the depthwise convolution in frames, odd")
    option(group, "--dropout", "dropout rate of every branch")
    option(group, "--position", "positions in the attention: relative, rotary or none")
    option(group, "--conv-norm", "norm in the convolution module: layer, batch, group or none")
    text = "frames merged into one: none, stack:FACTOR, conv:2 or conv:4"
    option(group, "--subsampling", text, metavar="KIND[:FACTOR]")


def add_feature_options(option: Option, group: argparse._ArgumentGroup) -> None:
    """Add the settings of the log-mel features."""
    option(group, "--mel-bins", "log-mel filters")
    option(group, "--low-freq", "lower edge in Hz")
    option(group, "--high-freq", "upper edge in Hz, inside the band of all the speech")


def add_optimizer_options(option: Option, group: argparse._ArgumentGroup) -> None:
    """Add the optimizer and its settings."""
    text = "adamw; muon: Muon for the matrices of the layers, AdamW for all else"
    option(group, "--optimizer", text, choices=OPTIMIZERS)
    option(group, "--learning-rate", "peak learning rate")
    option(group, "--warmup", "part of the run in which the learning rate rises")
    option(group, "--weight-decay", "weight decay of matrices")
    option(group, "--clip", "largest norm of the gradient")


def split_subsampling(text: str) -> tuple[str, int]:
    """Split ``--subsampling``: ``"stack:4"`` -> ``("stack", 4)``.

    Raises:
        ValueError: the factor is no number.
    """
    kind, colon, factor = text.partition(":")
    if colon and not factor.isdecimal():
        raise ValueError(f"--subsampling is {text!r}; expected none, stack:FACTOR, conv:2 or conv:4")
    return kind, int(factor or 1)


def contradictions(given: Mapping[str, Any], was: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Say which given options differ from those of the run to be resumed, other than the ``free`` ones."""
    if "subsampling" in given:
        given = {**given, "subsampling": ":".join(map(str, split_subsampling(given["subsampling"])))}
    return [
        f"--{name.replace('_', '-')} is {_shown(given[name])} but was {_shown(value)}"
        for name, value in was.items()
        if name in given and name not in free and _listed(given[name]) != _listed(value)
    ]


def _listed(value: Any) -> Any:
    """Value for a comparison: JSON turns tuples into lists, and the order of names does not matter."""
    return sorted(value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "empty"
    return "not set" if value is None else str(value)
