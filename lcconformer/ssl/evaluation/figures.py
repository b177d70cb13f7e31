"""Figures of the reports.  Each series has a colour (Okabe and Ito's palette), a marker and a dash pattern of its own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "accuracy_figure",
    "consistency_figure",
    "depth_figure",
    "depth_loss_figure",
    "loss_figure",
    "render",
    "require_matplotlib",
    "time_figure",
    "trade_figure",
]

# colour, marker and dash pattern of the first, second, ... series
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#737373", "^", ":"),
    ("#009E73", "D", "-."),
    ("#CC79A7", "v", "-"),
    ("#E69F00", "P", "--"),
    ("#56B4E9", "X", ":"),
    ("#000000", "<", "-."),
    ("#8C564B", ">", "-"),
    ("#7F7F00", "h", "--"),
)
_MEASURES = {
    "cosine": "cosine similarity\n(1: same vectors)",
    "cka": "linear CKA\n(1: same up to rotation)",
    "knn": "mutual 10 nearest neighbours\n(1: same neighbourhoods)",
    "frechet": "Fréchet distance, normalised\n(0: same distribution)",
}
_MOST_NUMBERS = 17  # rows of a heat map that has its numbers written in
_TEXT: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "lcconformer[demo]"') from error


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure (sizes in inches) and its axes ``[rows, columns]``, without pyplot, whose state belongs to the user."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(rc=_TEXT):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def render(figure: Figure, form: str = "png") -> bytes:
    """Draw a figure as the content of a file.

    Raises:
        ValueError: a format that matplotlib does not write.
    """
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"cannot draw a {form!r} file; expected one of {', '.join(sorted(known))}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=120)
    return buffer.getvalue()


def consistency_figure(matrices: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Heat maps with their numbers, a row per model and a column per measure that all models have.

    One colour scale per measure serves all models.  It spans the values between different depths from 1 on, where trained and
    untrained models differ; the front end (depth 0), which is less like any other depth, may lie beyond it.
    """
    shown = {m: title for m, title in _MEASURES.items() if all(m in model for model in matrices.values())}
    figure, axes = _figure(len(matrices), len(shown), 4.3 * len(shown), 0.9 + 3.8 * len(matrices))
    for column, (measure, title) in enumerate(shown.items()):
        low, high = _colour_range(measure, [model[measure] for model in matrices.values()])
        # the bright end of the map is "alike" for all of them
        colours = "cividis_r" if measure == "frechet" else "cividis"
        for row, (name, model) in enumerate(matrices.items()):
            ax = axes[row, column]
            image = ax.imshow(model[measure], vmin=low, vmax=high, cmap=colours, origin="lower")
            _write_numbers(ax, model[measure], image)
            ax.grid(False)
            ticks = range(0, len(model[measure]), max(1, len(model[measure]) // 9))
            ax.set_xticks(ticks)
            ax.set_yticks(ticks)
            ax.set_xlabel("depth")
            ax.set_ylabel(f"{name}\n\ndepth" if column == 0 else "depth")
            if row == 0:
                ax.set_title(title)
        beyond = "max" if measure == "frechet" else "min"
        ax_column = list(axes[:, column])
        figure.colorbar(image, ax=ax_column, extend=beyond, location="bottom", shrink=0.85, aspect=30, pad=0.02)
    return figure


def _colour_range(measure: str, matrices: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of the colour scale: from "alike" to the pair of depths from 1 on that is least alike in any model."""
    values = np.concatenate([m[1:, 1:].ravel() for m in matrices])
    if measure == "frechet":
        return 0.0, max(0.05, float(values.max(initial=0.0)))
    return min(0.95, float(values.min(initial=1.0))), 1.0


def _write_numbers(ax: Axes, matrix: np.ndarray, image: AxesImage) -> None:
    """The value of each cell, to two places, as far as there is room."""
    if len(matrix) > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(matrix):
        red, green, blue, _ = image.to_rgba(value)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{value:.2f}".removeprefix("0") if value >= 0 else f"{value:.1f}"
        ax.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=min(9.0, 80.0 / len(matrix)),
        )


def loss_figure(histories: Mapping[str, Sequence[tuple[float, float]]], ylabel: str, window: int) -> Figure:
    """Training loss over training time; ``histories`` holds the pairs (seconds, loss) of all steps, by name of the run."""
    figure, axes = _figure(1, 1, 9.0, 4.2)
    ax = axes[0, 0]
    for (name, history), (colour, _, dash) in zip(histories.items(), _STYLES):
        seconds, losses = np.array(history).T
        width = max(1, min(window, len(losses)))
        smooth = np.convolve(losses, np.full(width, 1.0 / width), "valid")
        ax.plot(seconds, losses, color=colour, alpha=0.18, linewidth=0.8)
        ax.plot(seconds[width - 1 :], smooth, color=colour, linestyle=dash, linewidth=2, label=name)
    ax.set_xlabel("training time (s)")
    ax.set_ylabel(ylabel)
    ax.set_title(f"Training loss (thick: mean of {window} steps)")
    ax.legend()
    return figure


def depth_loss_figure(losses: Mapping[str, Sequence[float]], ylabel: str) -> Figure:
    """Held-out loss at depth 1 ... N, by name of the run."""
    figure, axes = _figure(1, 1, 9.0, 4.2)
    ax = axes[0, 0]
    for (name, values), style in zip(losses.items(), _STYLES):
        _line(ax, range(1, len(values) + 1), values, name, style)
    ax.set_xlabel("depth (loops run)")
    ax.set_ylabel(ylabel)
    ax.set_title("Loss on held-out speech, at every depth of the same weights")
    ax.legend()
    return figure


def accuracy_figure(
    accuracy: Mapping[str, Mapping[str, Mapping[int, float]]],
    floor: Mapping[str, float],
    chosen: Mapping[str, int],
) -> Figure:
    """Probe accuracy by depth: one panel per probe, all with the same range of accuracies.

    Args:
        accuracy: by probe, model and depth.
        floor: accuracy on the log-mel features, by probe.
        chosen: the depth to mark on the first model's curve, by probe.
    """
    figure, axes = _figure(1, len(accuracy), 11.0, 4.6, sharey=True)
    for ax, (probe, models) in zip(axes[0], accuracy.items()):
        for (name, by_depth), style in zip(models.items(), _STYLES):
            _line(ax, list(by_depth), [100 * a for a in by_depth.values()], name, style)
        name, first = next(iter(models.items()))
        at, label = chosen[probe], f"{name}: smallest within 1% of best"
        ax.plot(at, 100 * first[at], "o", markersize=15, fillstyle="none", color="black", label=label)
        ax.axhline(100 * floor[probe], color="black", linewidth=1, linestyle=(0, (6, 3)), label="log-mel, 11 frames")
        ax.set_xlabel("depth (0: front end)")
        ax.set_title({"linear": "Linear probe", "hidden": "One hidden layer"}[probe])
    axes[0, 0].set_ylabel("phone frame accuracy (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def time_figure(milliseconds: Mapping[str, Mapping[int, float]]) -> Figure:
    """Inference time in milliseconds per second of speech, by model and depth."""
    figure, axes = _figure(1, 1, 9.0, 4.2)
    ax = axes[0, 0]
    for (name, by_depth), style in zip(milliseconds.items(), _STYLES):
        _line(ax, list(by_depth), list(by_depth.values()), name, style)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("depth (loops run)")
    ax.set_ylabel("ms per second of speech")
    ax.set_title("Inference time of the encoder")
    ax.legend()
    return figure


def depth_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]],
    levels: Mapping[str, Mapping[str, float]] | None = None,
    tops: Mapping[str, float] | None = None,
) -> Figure:
    """Values by depth with error bars, a panel per quantity.

    Args:
        panels: by label of the vertical axis, series and depth: value and half the length of its bar (None: no bar).
        levels: horizontal lines, by label of the vertical axis and of the line.
        tops: where a vertical axis ends, by its label; a line that goes higher leaves the picture.
    """
    figure, axes = _figure(1, len(panels), 6.0 * len(panels) + (0.0 if len(panels) > 1 else 3.0), 4.8)
    for ax, (label, series) in zip(axes[0], panels.items()):
        most = max(len(series), 2)
        for number, ((name, by_depth), (colour, marker, dash)) in enumerate(zip(series.items(), _STYLES)):
            # side by side, so that bars at one depth do not cover each other
            shift = 0.16 * (number / (most - 1) - 0.5)
            x = [depth + shift for depth in by_depth]
            y, bars = ([v[i] for v in by_depth.values()] for i in (0, 1))
            style: Any = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.8, "label": name}
            ax.errorbar(x, y, None if None in bars else bars, capsize=3, **style)
        for number, (name, level) in enumerate((levels or {}).get(label, {}).items()):
            dashes = ((0, (6, 3)), (0, (2, 2)))[number % 2]
            ax.axhline(level, color="black", linewidth=1, linestyle=dashes, label=name)
        ax.set_xticks(sorted({depth for by_depth in series.values() for depth in by_depth}))
        ax.set_xlabel("depth (loops run)")
        ax.set_ylabel(label)
        ax.set_ylim(top=(tops or {}).get(label))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def trade_figure(curves: Mapping[str, Sequence[tuple[float, float]]], ylabel: str) -> Figure:
    """Error against the mean depth of an exit rule; ``curves`` holds pairs (mean depth, error) by name."""
    figure, axes = _figure(1, 1, 9.0, 4.8)
    ax = axes[0, 0]
    for (name, points), (colour, marker, dash) in zip(curves.items(), _STYLES):
        x, y = np.array(points).T
        ax.plot(x, y, color=colour, marker=marker, linestyle=dash, linewidth=1.8, markersize=5, label=name)
    ax.set_xlabel("mean depth (loops run, over utterances)")
    ax.set_ylabel(ylabel)
    ax.legend()
    return figure


def _line(ax: Axes, x: Any, y: Any, name: str, style: tuple[str, str, str]) -> None:
    colour, marker, dash = style
    ax.plot(x, y, color=colour, marker=marker, linestyle=dash, linewidth=1.8, label=name)
    ax.set_xticks(list(x))
