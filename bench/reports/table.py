"""Result rows as text, one table per case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.rows import Row
from ..providers.registry import PROVIDERS

__all__ = ["case_tables", "flops_rate", "flops_unit", "grid", "label", "notes", "number"]

NOTES = {(p.name, p.backend): p.note for p in PROVIDERS if p.note}


def number(value: float | None, unit: str = "") -> str:
    """Format with three significant digits and separated thousands; None, which was not measured, is a dash."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}{unit}"
    return (f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}") + unit


def grid(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lay out a table: the first ``left`` columns flush left, the others flush right."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]

    def draw(line: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([draw(table[0]), "  ".join("-" * w for w in widths), *map(draw, table[1:])])


def flops_unit(rates: Iterable[float]) -> tuple[str, float]:
    """Unit for rates given in TFLOP/s, and their factor to it: ``("GFLOP/s", 1000)`` if all are below one."""
    return ("TFLOP/s", 1.0) if max(rates) >= 1 else ("GFLOP/s", 1e3)


def flops_rate(tflops: float) -> str:
    """Format a rate with its unit."""
    unit, scale = flops_unit([tflops])
    return f"{number(scale * tflops)} {unit}"


def label(row: Row) -> str:
    """Name of a row's provider: ``eager``, ``lcconformer:triton``, ``lcconformer:triton depth 5``."""
    name = row.provider if (row.provider, row.backend) == ("eager", "torch") else f"{row.provider}:{row.backend}"
    return name + ("" if row.depth == row.layers or ":" in row.mode else f" depth {row.depth}")


def case_tables(rows: Sequence[Row]) -> str:
    """One table per case, the slowest provider first."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        shape = (row.mode, row.batch, row.frames, row.d_model, row.layers, row.dtype, row.device_name)
        cases.setdefault(shape, []).append(row)
    parts = []
    for (mode, batch, frames, d_model, layers, dtype, name), members in cases.items():
        stack = "" if ":" in mode else f", N = {layers}"
        title = f"{mode}, B = {batch}, T = {frames}, d = {d_model}{stack}, {dtype}, on {name}"
        members = sorted(members, key=lambda r: -r.median_ms)
        unit, scale = flops_unit(r.tflops for r in members)
        header = ["provider", "ms", "p20", "p80", "vs eager", "frames/s", "RTF", "MB", unit, "GB/s", "of floor"]
        lines = [
            [
                label(r),
                number(r.median_ms),
                number(r.p20_ms),
                number(r.p80_ms),
                number(r.speedup_vs_eager, "x"),
                number(r.tokens_per_s),
                number(r.rtf),
                number(r.peak_memory_mb),
                number(scale * r.tflops),
                number(r.gb_per_s),
                number(r.percent_of_roofline, "%"),
            ]
            for r in members
        ]
        parts.append(title + "\n" + grid(header, lines))
    return "\n\n".join(parts)


def notes(rows: Sequence[Row]) -> str:
    """How the maths of the providers in these rows differs, a line each."""
    seen = {(r.provider, r.backend) for r in rows}
    return "\n".join(f"{name}:{backend}: {note}" for (name, backend), note in NOTES.items() if (name, backend) in seen)
