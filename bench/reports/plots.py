"""Plots of rows: scaling with length and batch, speedup bars, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.case import Case
from ..core.roofline import work
from ..core.rows import Results, Row
from .table import flops_rate, flops_unit, label, number

__all__ = ["plot"]

# lcconformer stands out; torchaudio, which computes less than the canon, is grey
COLOURS = {
    "eager": "#1f2937",
    "sdpa:torch": "#0f766e",
    "compile:inductor": "#2563eb",
    "compile:graphs": "#60a5fa",
    "compile:max-autotune": "#93c5fd",
    "torchaudio:torch": "#9ca3af",
    "transformers:wav2vec2": "#a16207",
    "transformers:parakeet": "#d4a72c",
    "lcconformer:torch": "#fda4af",
    "lcconformer:cpu": "#fb7185",
    "lcconformer:cpu+loop": "#be123c",
    "lcconformer:triton": "#e11d48",
    "lcconformer:triton+loop": "#7e22ce",
    "lcconformer:cuda": "#881337",
    "lcconformer:triton+graphs": "#db2777",
    "lcconformer:cuda+graphs": "#9333ea",
}
FALLBACK = "#65a30d"


def _colour(name: str) -> str:
    return COLOURS.get(name.partition(" depth ")[0], FALLBACK)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("bench --plot needs matplotlib; pip install 'lcconformer[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "figure.dpi": 120,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e7eb",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return pyplot


def plot(rows: Sequence[Row], results: Results, folder: Path) -> list[Path]:
    """Write PNG files of the rows of one mode and device to ``folder``; returns their paths.

    Panels against length or batch appear where the rows hold at least two of them.
    """
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    modes = list(dict.fromkeys((r.mode, r.d_model, r.dtype) for r in rows))
    for mode, d_model, dtype in modes:
        members = [r for r in rows if (r.mode, r.d_model, r.dtype) == (mode, d_model, dtype)]
        stem = f"{mode.replace(':', '-')}-d{d_model}-{dtype}"
        title = f"{mode.replace(':', ', ')}, d = {d_model}, {dtype}, {members[0].device_name}"
        for kind, draw in (("scaling", _scaling), ("speedup", _speedup), ("roofline", _roofline)):
            figure = draw(plt, members, results)
            if figure is None:
                continue
            figure.suptitle(title, fontsize=10, x=0.02, ha="left")
            path = folder / f"{stem}-{kind}.png"
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            paths.append(path)
    return paths


def _series(rows: Sequence[Row], along: str) -> tuple[int, dict[str, list[Row]]] | None:
    """Rows by label along ``"frames"`` or ``"batch"``, at the value of the other one that has the most points."""
    other = "batch" if along == "frames" else "frames"
    values: dict[int, set[int]] = {getattr(r, other): set() for r in rows}
    for r in rows:
        values[getattr(r, other)].add(getattr(r, along))
    fixed = max(values, key=lambda v: (len(values[v]), v))
    if len(values[fixed]) < 2:
        return None
    found: dict[str, list[Row]] = {}
    for r in sorted(rows, key=lambda r: getattr(r, along)):
        if getattr(r, other) == fixed:
            found.setdefault(label(r), []).append(r)
    return fixed, found


def _scaling(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    panels = [(along, found) for along in ("frames", "batch") if (found := _series(rows, along))]
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 2, figsize=(10, 3.6 * len(panels)), squeeze=False, layout="constrained")
    for (latency, throughput), (along, (fixed, series)) in zip(axes, panels):
        where = f"B = {fixed}" if along == "frames" else f"T = {fixed}"
        for name, members in series.items():
            x = [getattr(r, along) for r in members]
            style = dict(color=_colour(name), marker="o", markersize=4, linewidth=2 if "lcconformer" in name else 1.2)
            latency.plot(x, [r.median_ms for r in members], label=name, **style)
            latency.fill_between(
                x, [r.p20_ms for r in members], [r.p80_ms for r in members], color=_colour(name), alpha=0.12, lw=0
            )
            throughput.plot(x, [r.tokens_per_s for r in members], label=name, **style)
        for axis, text in ((latency, "median ms (band: p20 to p80)"), (throughput, "frames per second")):
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="frames T" if along == "frames" else "batch B",
                title=f"{text}, {where}",
            )
            ticks = sorted({getattr(r, along) for members in series.values() for r in members})
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            _plain_ticks(axis.yaxis)
    axes[0][1].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))


def _speedup(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    rows = [r for r in rows if r.speedup_vs_eager is not None]
    shapes = list(dict.fromkeys((r.batch, r.frames) for r in rows))
    names = list(dict.fromkeys(label(r) for r in rows if r.provider != "eager"))
    if not names:
        return None
    height = 0.24 * len(names) * len(shapes) + 0.5 * len(shapes) + 0.8
    figure, axis = plt.subplots(figsize=(7.5, height), layout="constrained")
    y, ticks = 0.0, []
    for batch, frames in shapes:
        members = [r for r in rows if (r.batch, r.frames) == (batch, frames) and r.provider != "eager"]
        members.sort(key=lambda r: r.speedup_vs_eager or 0.0)
        axis.text(0, y - 0.75, f"B = {batch}, T = {frames}", fontsize=8, fontweight="bold", va="center")
        for r in members:
            faded = 1.0 if r.depth == r.layers else 0.55
            axis.barh(y, r.speedup_vs_eager, height=0.8, color=_colour(label(r)), alpha=faded)
            axis.annotate(
                f"{r.speedup_vs_eager:.2f}x", (r.speedup_vs_eager, y), (4, 0), textcoords="offset points", va="center",
                fontsize=7.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            ticks.append((y, label(r)))
            y += 1
        y += 1.4
    axis.axvline(1.0, color="#1f2937", lw=1, ls="--")
    axis.set_yticks([t for t, _ in ticks], [name for _, name in ticks], fontsize=7.5)
    axis.set(xlabel="times as fast as eager PyTorch (dashed: eager)", ylim=(y - 1.2, -1.3))
    axis.grid(axis="y", visible=False)
    return figure


def _roofline(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    """Useful TFLOP/s over the intensity of the maths, under the measured ceilings."""
    ceiling = results.ceilings.get(f"{rows[0].device_name} {rows[0].dtype}")
    points = []
    for r in rows:
        case = Case(r.mode, r.batch, r.frames, r.d_model, r.layers, r.depth, r.dtype, r.device)
        needed = work(case, "none" if r.provider == "torchaudio" else "relative")
        if needed.flops:
            points.append((needed.flops / needed.bytes, r))
    if ceiling is None or not points:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    unit, scale = flops_unit([ceiling["gemm_tflops"]])
    ridge = ceiling["gemm_tflops"] * 1e12 / (ceiling["copy_gb_s"] * 1e9)
    low = min(ridge, *(x for x, _ in points)) / 3
    high = max(ridge, *(x for x, _ in points)) * 3
    axis.plot(
        [low, ridge, high],
        [scale * rate for rate in (low * ceiling["copy_gb_s"] / 1e3, ceiling["gemm_tflops"], ceiling["gemm_tflops"])],
        color="#1f2937",
        lw=1.5,
    )
    axis.annotate(
        f"matrix product {flops_rate(ceiling['gemm_tflops'])}", (high, scale * ceiling["gemm_tflops"]),
        ha="right", va="bottom", fontsize=7.5, xytext=(0, 2), textcoords="offset points",
    )  # fmt: skip
    shapes = list(dict.fromkeys((r.batch, r.frames) for _, r in points))
    markers = dict(zip(shapes, "osD^vP*X" * len(shapes)))
    named: set[str] = set()
    for x, r in points:
        name = label(r)
        axis.scatter(
            x, scale * r.tflops, color=_colour(name), marker=markers[r.batch, r.frames], s=34, zorder=3,
            label=None if name in named else name,
        )  # fmt: skip
        named.add(name)
    for (batch, frames), marker in markers.items():
        axis.scatter([], [], color="white", edgecolor="#1f2937", marker=marker, label=f"B = {batch}, T = {frames}")
    axis.set(
        xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel=f"useful {unit}",
        title=f"ceilings measured here; copy {number(ceiling['copy_gb_s'])} GB/s",
    )  # fmt: skip
    axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
