"""Options that several commands share."""

from __future__ import annotations

import argparse

import torch

__all__ = ["add_checkpoint_argument", "add_device_argument", "names"]


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
