"""Plots of result rows: latency and throughput over length and batch, speedup over eager PyTorch, and the roofline.

Every panel lists providers in one order and shows the spread of the rounds, p20 to p80. Where that spread is wider than a
tenth of the median the rounds disagree: bars are hatched, markers hollow, and a line below the panels says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lcconformer.runtime import replacing

from ..core.case import Case
from ..core.roofline import work
from ..core.rows import Results, Row
from .table import flops_rate, flops_unit, label, number

__all__ = ["plot"]

# in the order of every panel and legend; lcconformer stands out, and torchaudio, which computes less, is grey
COLOURS = {
    "eager": "#1f2937",
    "sdpa:torch": "#0f766e",
    "compile:inductor": "#2563eb",
    "compile:graphs": "#60a5fa",
    "compile:max-autotune": "#93c5fd",
    "torchaudio:torch": "#9ca3af",
    "transformers:wav2vec2": "#a16207",
    "transformers:parakeet": "#d4a72c",
    "onnxruntime:cpu": "#65a30d",
    "openvino:cpu": "#84cc16",
    "lcconformer:torch": "#fda4af",
    "lcconformer:cpu": "#fb7185",
    "lcconformer:cpu+loop": "#be123c",
    "lcconformer:triton": "#e11d48",
    "lcconformer:triton+loop": "#7e22ce",
    "lcconformer:triton+graphs": "#db2777",
    "lcconformer:triton+loop+graphs": "#0d9488",
    "lcconformer:cuda": "#881337",
    "lcconformer:cuda+graphs": "#9333ea",
    "lcconformer:cuda+cluster": "#0369a1",
    "lcconformer:cuda+cluster+graphs": "#1d4ed8",
}
FALLBACK, INK, WARNING = "#78716c", "#1f2937", "#b45309"
# p20 to p80 over the median, above which rounds disagree
DISAGREE = 0.1


def _colour(name: str) -> str:
    return COLOURS.get(name.partition(" depth ")[0], FALLBACK)


def _disagree(row: Row) -> bool:
    return row.p80_ms - row.p20_ms > DISAGREE * row.median_ms


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of COLOURS, deep before shallow, unknown providers last."""
    places = {name: i for i, name in enumerate(COLOURS)}
    return sorted(rows, key=lambda r: (places.get(label(r).partition(" depth ")[0], len(places)), label(r), -r.depth))


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
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e7eb",
            "axes.axisbelow": True,
            "hatch.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 8,
        }
    )
    return pyplot


def plot(rows: Sequence[Row], results: Results, folder: Path) -> list[Path]:
    """Write PNG files of the rows of one device to ``folder``, those of each mode, width and dtype apart.

    A plot against length or batch needs rows at two of them at least, one of speedup needs rows of eager PyTorch, and a
    roofline needs ceilings in ``results``.

    Returns:
        The paths of what was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    paths = []
    for mode, d_model, dtype in dict.fromkeys((r.mode, r.d_model, r.dtype) for r in rows):
        members = _in_order(r for r in rows if (r.mode, r.d_model, r.dtype) == (mode, d_model, dtype))
        stem = f"{mode.replace(':', '-')}-d{d_model}-{dtype}"
        layers = ", ".join(str(n) for n in sorted({r.layers for r in members}))
        stack = "" if ":" in mode else f", N = {layers}"
        title = f"{mode.replace(':', ', ')}, d = {d_model}{stack}, {dtype}, {members[0].device_name}"
        for kind, draw in (("scaling", _scaling), ("speedup", _speedup), ("roofline", _roofline)):
            figure = draw(plt, members, results)
            if figure is None:
                continue
            figure.suptitle(title, fontsize=10, x=0.01, ha="left")
            path = folder / f"{stem}-{kind}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", bbox_inches="tight")
            plt.close(figure)
            paths.append(path)
    return paths


def _warn(figure: Any, rows: Iterable[Row], sign: str) -> None:
    """A line at the bottom of the figure if rounds of any row disagree."""
    if any(map(_disagree, rows)):
        reason = f"rounds disagree, p20 to p80 is more than {DISAGREE:.0%} of the median"
        figure.supxlabel(
            f"{sign}: {reason}; measure again on an idle machine", fontsize=8, color=WARNING, x=0.01, ha="left"
        )


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
    for r in rows:
        if getattr(r, other) == fixed:
            found.setdefault(label(r), []).append(r)
    return fixed, {name: sorted(members, key=lambda r: getattr(r, along)) for name, members in found.items()}


def _scaling(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    """Latency and throughput against frames, then against batch."""
    panels = [(along, found) for along in ("frames", "batch") if (found := _series(rows, along))]
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 2, figsize=(10, 3.6 * len(panels)), squeeze=False, layout="constrained")
    shown: list[Row] = []
    for (latency, throughput), (along, (fixed, series)) in zip(axes, panels):
        for name, members in series.items():
            shown += members
            # middle, low and high end of each point
            times = [(r.median_ms, r.p20_ms, r.p80_ms) for r in members]
            rates = [
                (r.tokens_per_s, *(r.tokens_per_s * r.median_ms / p for p in (r.p80_ms, r.p20_ms))) for r in members
            ]
            for axis, points in ((latency, times), (throughput, rates)):
                _line(axis, name, [getattr(r, along) for r in members], points, [_disagree(r) for r in members])
        ticks = sorted({getattr(r, along) for members in series.values() for r in members})
        for axis, text in ((latency, "latency, ms"), (throughput, "throughput, frames/s")):
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="frames T" if along == "frames" else "utterances B",
                ylabel=text,
                title=f"{'B' if along == 'frames' else 'T'} = {fixed}: median, p20 to p80",
            )
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            _plain_ticks(axis.yaxis)
    axes[0][1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    _warn(figure, shown, "hollow")
    return figure


def _line(
    axis: Any, name: str, x: Sequence[int], points: Sequence[tuple[float, float, float]], doubtful: Sequence[bool]
) -> None:
    """Medians joined by a line, with whiskers; hollow markers where rounds disagree."""
    middle = [m for m, _, _ in points]
    whiskers = [[m - low for m, low, _ in points], [high - m for m, _, high in points]]
    colour = _colour(name)
    style = dict(color=colour, lw=2 if name.startswith("lcconformer") else 1.2, ls="--" if " depth " in name else "-")
    axis.errorbar(x, middle, yerr=whiskers, capsize=3, elinewidth=1, marker="o", markersize=5, label=name, **style)
    for a, m, bad in zip(x, middle, doubtful):
        if bad:
            axis.plot(a, m, "o", color=colour, markerfacecolor="white", markersize=5, zorder=3)


def _plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers: more of them for each decade, the fewer decades the axis spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    steps = range(1, 10) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))


def _speedup(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    """A panel per shape, a bar per provider, all panels with the same bars in the same order."""
    rows = [r for r in rows if r.speedup_vs_eager is not None]
    names = list(dict.fromkeys(label(r) for r in rows))
    if names in ([], ["eager"]):
        return None
    shapes = sorted({(r.batch, r.frames) for r in rows})
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2 + 4 * columns, lines * (0.25 * len(names) + 0.6) + 0.5),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (batch, frames) in zip(axes.flat, shapes):
        members = {label(r): r for r in rows if (r.batch, r.frames) == (batch, frames)}
        for y, name in enumerate(names):
            if name in members:
                _bar(axis, y, name, members[name])
        axis.axvline(1.0, color=INK, lw=1, ls="--")
        axis.set_title(f"B = {batch}, T = {frames}")
        axis.grid(axis="y", visible=False)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    # room for the numbers beside the longest whisker
    axes[0][0].set_xlim(0, 1.18 * max(_speeds(r)[2] for r in rows))
    for column in range(columns):
        lowest = max(i for i in range(lines) if i * columns + column < len(shapes))
        axes[lowest][column].set_xlabel("speedup over eager PyTorch (p20 to p80)")
        axes[lowest][column].tick_params(labelbottom=True)
    _warn(figure, rows, "hatched")
    return figure


def _speeds(row: Row) -> tuple[float, float, float]:
    """Speedup over the median of eager PyTorch: of the median, of the slow p80 and of the fast p20."""
    speedup = row.speedup_vs_eager or 0.0
    return speedup, speedup * row.median_ms / row.p80_ms, speedup * row.median_ms / row.p20_ms


def _bar(axis: Any, y: int, name: str, row: Row) -> None:
    middle, low, high = _speeds(row)
    doubtful = _disagree(row)
    axis.barh(
        y, middle, height=0.75, color=_colour(name), alpha=0.55 if " depth " in name else 1.0,
        hatch="////" if doubtful else None, edgecolor="white", lw=0,
        xerr=[[middle - low], [high - middle]], error_kw=dict(ecolor=INK, elinewidth=1, capsize=2.5),
    )  # fmt: skip
    axis.annotate(
        f"{middle:.2f}x", (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8,
        color=WARNING if doubtful else INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def _roofline(plt: Any, rows: Sequence[Row], results: Results) -> Any:
    """Useful FLOP/s over arithmetic intensity, the FLOP per byte of the maths, under the ceilings of the machine."""
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
    peak, copy = scale * ceiling["gemm_tflops"], ceiling["copy_gb_s"]
    slope = scale * copy / 1e3  # GB/s -> FLOP/s in `unit` for one FLOP per byte
    ridge = peak / slope
    low = min(ridge, *(x for x, _ in points)) / 3
    high = max(ridge, *(x for x, _ in points)) * 3
    axis.plot([low, ridge, high], [slope * low, peak, peak], color=INK, lw=1.5)
    note = dict(fontsize=8, textcoords="offset points")
    axis.annotate(f"GEMM {flops_rate(ceiling['gemm_tflops'])}", (high, peak), (0, 3), ha="right", va="bottom", **note)
    axis.annotate(f"copy {number(copy)} GB/s", ((low * ridge) ** 0.5, slope * (low * ridge) ** 0.5), (6, -8), **note)
    shapes = sorted({(r.batch, r.frames) for _, r in points})
    markers = dict(zip(shapes, "osD^vP*X" * len(shapes)))
    for x, r in points:
        axis.scatter(x, scale * r.tflops, color=_colour(label(r)), marker=markers[r.batch, r.frames], s=34, zorder=3)
    for name in dict.fromkeys(label(r) for _, r in points):
        axis.scatter([], [], color=_colour(name), marker="s", label=name)
    for (batch, frames), marker in markers.items():
        axis.scatter([], [], color="white", edgecolor=INK, marker=marker, label=f"B = {batch}, T = {frames}")
    axis.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP/byte", ylabel=f"useful {unit}")
    axis.minorticks_off()
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
