"""Results of the demo as text: a summary beside the paper's numbers, a table of all depths, and remarks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ...data import PHONES
from ..evaluation.classifiers import PROBES
from ..evaluation.probes import LOG_MEL

__all__ = ["PAPER_NOTE", "depth_table", "format_results", "layers", "percent", "remarks", "summary"]

# from the abstract, which says nothing about hardware or about the definition of its percentages
PAPER = {"ratio": "7.8x", "training": "41.9%", "inference": "37.7%"}
PAPER_NOTE = (
    "The paper's numbers are from the abstract of arXiv 2105.00812 (LibriSpeech), which does not give sizes, depths, hardware "
    "or the definition of its speed-ups. Here, time saved is 1 - new/old."
)


def format_results(results: Mapping[str, Any]) -> str:
    """Format the summary, the table of depths and the remarks for a terminal."""
    lines = ["", f"{'':<54}{'this run':>11}{'the paper':>11}"]
    lines += [f"{name:<54}{value:>11}{paper:>11}" for name, value, paper in summary(results)]
    header, rows = depth_table(results)
    widths = [max(len(row[i]) for row in [*header[1:], *rows]) + 2 for i in range(len(rows[0]))]
    # the name of a group starts above its first column and extends over the following ones
    groups = ""
    for at, name in enumerate(header[0]):
        if name:
            groups = f"{groups:<{sum(widths[:at]) + 2}}{name}"
    lines += ["", groups]
    for row in [*header[1:], *rows]:
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))
    for text in [*remarks(results), PAPER_NOTE]:
        lines += ["", *textwrap.wrap(text, 100)]
    return "\n".join(lines)


def percent(part: float) -> str:
    return f"{100 * part:.1f}%"


def summary(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (quantity, value in this run, value in the paper)."""
    parameters, saving, training = results["parameters"], results["saving"], results["training"]
    sampled, fixed = training.values()
    rows = [
        ("parameters, shared", f"{parameters['shared']:,}", ""),
        ("parameters, a layer of its own per depth", f"{parameters['unshared']:,}", ""),
        ("  fewer by", f"{parameters['ratio']:.2f}x", PAPER["ratio"]),
        (f"training time, sampled depth, {sampled['steps']} steps", f"{sampled['seconds']:.1f} s", ""),
        (f"training time, fixed depth, {fixed['steps']} steps", f"{fixed['seconds']:.1f} s", ""),
        ("  time saved", percent(saving["time_saved"]), PAPER["training"]),
        ("  throughput ratio", f"{saving['throughput_ratio']:.2f}x", ""),
        ("  loops saved", percent(saving["loops_saved"]), ""),
    ]
    if results["smallest_depth"]:
        for probe in PROBES:
            chosen = results["smallest_depth"][probe]
            rows += [
                (
                    f"smallest depth within 1% of best, {_probe_name(probe)}",
                    f"{chosen['depth']} of {layers(results)}",
                    "",
                ),
                ("  inference time saved", percent(chosen["time_saved"]), PAPER["inference"]),
                ("  throughput ratio", f"{chosen['throughput_ratio']:.2f}x", ""),
            ]
    return rows


def _probe_name(probe: str) -> str:
    return {"linear": "linear probe", "hidden": "hidden-layer probe"}[probe]


def layers(results: Mapping[str, Any]) -> int:
    return results["setup"]["config"]["num_layers"]


def depth_table(results: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Header rows, and a row per depth: held-out loss of the trained models, accuracies of all, time of the first."""
    training, inference = results["training"], results["inference"]["ms_per_second"]
    models = list(inference)
    groups, names = (
        ["", "held-out loss", *[""] * (len(training) - 1)],
        ["depth", *(name.split()[0] for name in training)],
    )
    value: dict[tuple[str, int | None, str], float] = {}
    if results["probe"]:
        value = {(r["features"], r["depth"], r["probe"]): r["accuracy"] for r in results["probe"]["rows"]}
        for probe in PROBES:
            groups += [_probe_name(probe), *[""] * (len(models) - 1)]
            names += [name.split()[0] for name in models]
    header = [[*groups, "time"], [*names, "ms/s"]]
    rows = []
    if value:
        rows.append(
            [LOG_MEL, *("" for _ in training)]
            + [percent(value[LOG_MEL, None, p]) if i == 0 else "" for p in PROBES for i in range(len(models))]
            + [""]
        )
    for depth in range(0 if value else 1, layers(results) + 1):
        row = [str(depth), *(f"{t['held_out_loss'][depth - 1]:.4f}" if depth else "" for t in training.values())]
        if value:
            row += [percent(value[name, depth, p]) for p in PROBES for name in models]
        row.append(f"{inference[models[0]][str(depth)]:.2f}" if depth else "")
        rows.append(row)
    return header, rows


def remarks(results: Mapping[str, Any]) -> list[str]:
    batch = results["inference"]["batch"]
    remarks = [
        "loss: masked reconstruction on held-out speech; ms/s: median time of the encoder trained with sampled depth, in "
        f"milliseconds per second of speech, for a batch of {batch['utterances']} utterances on {batch['threads']} threads",
    ]
    if results["probe"]:
        frames = results["probe"]["rows"][0]["frames"]
        remarks.append(
            f"percentages: phone frame accuracy of a linear and of a one-hidden-layer probe, {len(PHONES)} classes, "
            f"{frames:,} test frames; depth 0 is the front end; 'within 1%' is relative to the best accuracy at any "
            "depth from 1 on, on training speech that was held out to choose the depth by"
        )
    else:
        remarks.append("no phone probes: this speech has no phone alignments")
    return remarks
