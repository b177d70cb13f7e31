"""The command line: ``lcconformer COMMAND``, or ``python -m lcconformer COMMAND``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int | None``; it is imported only when called.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from . import __version__
from .runtime import RunError

COMMANDS = {
    "info": ("lcconformer.cli.info", "versions, device, and which backend each op would use and why not the others"),
    "doctor": ("lcconformer.cli.doctor", "run every op by every backend here and compare with float64"),
    "demo": (
        "lcconformer.cli.demo",
        "pretrain a small encoder on real speech in minutes and write a report with plots",
    ),
    "pretrain": ("lcconformer.cli.pretrain", "self-supervised pretraining on your speech"),
    "finetune": ("lcconformer.cli.finetune", "train an encoder to recognise speech, and measure it at every depth"),
    "reproduce": (
        "lcconformer.cli.reproduce",
        "the paper's comparison: train, measure and report, with controls and seeds",
    ),
    "transcribe": ("lcconformer.cli.transcribe", "print what is said in audio files"),
    "probe": ("lcconformer.cli.probe", "phone-classification probe at every depth of a checkpoint"),
    "consistency": ("lcconformer.cli.consistency", "how alike the hidden states of different depths are"),
    "tune": (
        "lcconformer.cli.tune",
        "measure launch configurations of the Triton kernels on this GPU, and keep the best",
    ),
    "bench": ("lcconformer.bench.cli", "speed of training and inference against PyTorch and the peers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lcconformer",
        description="A Conformer encoder for speech whose layers share one set of weights.",
        epilog="'lcconformer COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"lcconformer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv[:1] == [name]:
            command = importlib.import_module(module)
            command.add_arguments(sub)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code = command.run(args) or 0
        sys.stdout.flush()  # here, so that a closed pipe is met below and not at the interpreter's exit
        return code
    except BrokenPipeError:
        # the reader of the output has left, as in "lcconformer info | head": nothing is wrong, and nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        # the message says what was wrong, what was got and what to do; a traceback would hide it
        print(f"lcconformer {args.command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2


if __name__ == "__main__":
    sys.exit(main())
