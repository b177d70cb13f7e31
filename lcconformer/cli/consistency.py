"""``lcconformer consistency``: how alike the hidden states of different depths are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..data import load_corpus
from ..runtime import ProgressBar, check_output, write_atomically
from ..ssl.evaluation.consistency import MEASURES, model_consistency, summarise
from ..ssl.evaluation.hidden_states import random_init_like
from ..ssl.evaluation.output import describe_machine, write_json
from ..ssl.model import load_model
from .options import add_checkpoint_argument, add_device_argument

__all__ = ["add_arguments", "format_summary", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="D",
        help="speech: a LibriSpeech folder tree, or a zip or folder with meta.jsonl",
    )
    parser.add_argument("--compare", metavar="C", help="second checkpoint, such as one without sharing")
    parser.add_argument(
        "--frames", type=int, default=8192, help="frames of speech, drawn at random from the corpus (default 8192)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the drawn frames and the random weights (default 0)"
    )
    add_device_argument(parser)
    parser.add_argument("--json", metavar="F", help="write the matrices to this file")
    parser.add_argument("--plot", metavar="P", help="write heat maps to this file (.png, .pdf, .svg)")


def run(args: argparse.Namespace) -> None:
    if args.frames < 2:
        raise ValueError(f"--frames is {args.frames}; expected 2 or more, well above the encoder's width")
    check_output("--json", args.json)
    check_output("--plot", args.plot, ".png", ".pdf", ".svg")
    model = load_model(args.checkpoint, args.device)
    models = {"checkpoint": model}
    if args.compare:
        models["compared"] = load_model(args.compare, args.device)
    models["random-init"] = random_init_like(model, args.seed)
    corpus = load_corpus(args.data)
    print(corpus, file=sys.stderr)
    matrices = {}
    with ProgressBar("consistency") as bar:
        for number, (name, which) in enumerate(models.items(), 1):
            matrices[name] = model_consistency(which, corpus, max_frames=args.frames, seed=args.seed)
            bar.update(number / len(models))
    print(format_summary(matrices))
    if args.json:
        result = {
            "checkpoint": str(args.checkpoint),
            "compared": args.compare,
            "corpus": corpus.name,
            "frames": args.frames,
            "seed": args.seed,
            "matrices": {name: {k: m.tolist() for k, m in pairs.items()} for name, pairs in matrices.items()},
            "machine": describe_machine(args.device),
        }
        print(f"wrote {write_json(args.json, result)}", file=sys.stderr)
    if args.plot:
        from ..ssl.evaluation.figures import consistency_figure, render

        labels = run_names(args.checkpoint, args.compare)
        figure = consistency_figure({labels.get(name, name): pairs for name, pairs in matrices.items()})
        image = render(figure, args.plot.rpartition(".")[2].lower())
        print(f"wrote {write_atomically(args.plot, image)}", file=sys.stderr)


def run_names(checkpoint: str, compared: str | None) -> dict[str, str]:
    """Labels of the plot: the name of each run's folder (or of the file), or the whole path where the names are equal."""

    def name(path: str) -> str:
        resolved = Path(path).resolve()
        return resolved.parent.name if resolved.name.startswith("step_") else resolved.name.removesuffix(".safetensors")

    paths = {"checkpoint": str(checkpoint), **({"compared": str(compared)} if compared else {})}
    names = {key: name(path) for key, path in paths.items()}
    return names if len(set(names.values())) == len(names) else paths


def format_summary(matrices: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Format a line per model: each measure averaged over all pairs of depths, and between the first and the last depth."""
    width = 10 * len(MEASURES)
    lines = [
        "",
        f"{'pairs of depths 1 ... N':<24}{'mean of all pairs':>{width - 10}}{'':>4}{'depth 1 to depth N':>{width}}",
    ]
    header = "".join(f"{m:>10}" for m in MEASURES)
    lines.append(f"{'':>14}{header}{'':>4}{header}")
    for name, pairs in matrices.items():
        mean = summarise(pairs)
        lines.append(
            f"{name:>14}"
            + "".join(f"{mean[m]:>10.3f}" for m in MEASURES)
            + f"{'':>4}"
            + "".join(f"{pairs[m][1, -1]:>10.3f}" for m in MEASURES)
        )
    lines.append(
        "cosine, CKA and nearest neighbours (knn): 1 means alike; "
        "Fréchet distance: 0 means the same distribution, 1 nothing in common"
    )
    return "\n".join(lines)
