"""The README's table of peers under ``accelerate``, from the files ``accelerated-*.json`` that the bench wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runs.accelerated import AcceleratedRow, read_rows

__all__ = ["section"]


def section(results: Path) -> str:
    """Markdown of the latest file of each machine in ``results``; a link to it is relative to the repository."""
    parts = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        files = sorted(folder.glob("accelerated-*.json"))
        if files:
            parts.append(_machine(files[-1], read_rows(files[-1])))
    return "\n\n".join(parts) or "No results are filed yet."


def _machine(path: Path, rows: Sequence[AcceleratedRow]) -> str:
    first = rows[0]
    shapes = {
        mode: sorted({(r.batch, r.frames) for r in rows if r.mode == mode}, key=lambda s: s[0] * s[1])
        for mode in ("inference", "training")
    }
    columns = [(mode, shape) for mode, some in shapes.items() for shape in some]
    header = ["peer", "layer, version", "error", *(f"{mode} {b} x {t}" for mode, (b, t) in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---:|" + "---:|" * len(columns)]
    for peer in dict.fromkeys(r.peer for r in rows):
        own = [r for r in rows if r.peer == peer]
        errors = [max((r.error for r in own if r.mode == mode), default=None) for mode in shapes]
        cells = [
            peer,
            f"`{own[0].layer}`, {own[0].package} {own[0].version}",
            " / ".join("-" if e is None else f"{e:.0e}" for e in errors),
        ]
        by_case = {(r.mode, (r.batch, r.frames)): r.speedup for r in own}
        cells += ["-" if (found := by_case.get(column)) is None else f"{found:.2f}x" for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"**{first.device_name} (CPU)**, {path.stem.split('-', 1)[1][:10]}, commit {first.commit}, torch "
        f"{first.versions['torch']}, d = {first.d_model}, N = {first.layers} layers, float32 "
        f"([rows](bench/results/{path.parent.name}/{path.name})). How many times as fast the accelerated model is, B x T."
    )
    note = (
        "Error: the largest of outputs in inference / of outputs and gradients in training, to the peer in float64, over the "
        "largest value. Training is forward and backward with the peer's dropout, without the optimiser."
    )
    return "\n".join([about, "", *lines, "", note])
