"""Figures show the numbers they are given, on scales that can be compared."""

import sys

import numpy as np
import pytest

from lcconformer.ssl.evaluation import figures
from lcconformer.ssl.evaluation.consistency import MEASURES


def heat_maps(figure):
    """Axes with a matrix in them, without the colour bars."""
    return [ax for ax in figure.axes if ax.get_images() and ax.get_xlabel() == "depth"]


def test_heat_maps_of_all_models_share_a_scale_per_measure():
    rng = np.random.default_rng(0)
    models = {name: {m: rng.uniform(0.3, 0.9, (4, 4)) for m in MEASURES} for name in ("a", "b")}
    for model in models.values():
        model["cosine"][0] = -0.5  # the front end does not stretch the scale
    axes = heat_maps(figures.consistency_figure(models))
    assert len(axes) == 8
    for column, measure in enumerate(MEASURES):
        values = np.stack([m[measure][1:, 1:] for m in models.values()])
        expected = (0.0, values.max()) if measure == "frechet" else (values.min(), 1.0)
        for ax, model in zip(axes[column::4], models.values()):
            (image,) = ax.get_images()
            np.testing.assert_array_equal(image.get_array(), model[measure])
            assert image.get_clim() == pytest.approx(expected)
    assert axes[0].get_ylabel().startswith("a")
    assert axes[4].get_ylabel().startswith("b")


def test_heat_maps_tell_trained_from_random_and_show_their_numbers():
    alike, apart = np.full((3, 3), 0.98), np.full((3, 3), 0.80)
    for matrix in (alike, apart):
        np.fill_diagonal(matrix, 1.0)
    models = {name: {m: x if m != "frechet" else 1 - x for m in MEASURES} for name, x in (("t", alike), ("r", apart))}
    axes = heat_maps(figures.consistency_figure(models))
    for trained, random in zip(axes[:4], axes[4:]):
        light = [
            ax.get_images()[0].to_rgba(ax.get_images()[0].get_array())[1, 2, :3].mean() for ax in (trained, random)
        ]
        assert light[0] - light[1] > 0.2
    assert [text.get_text() for text in axes[0].texts] == [
        "1.00",
        ".98",
        ".98",
        ".98",
        "1.00",
        ".98",
        ".98",
        ".98",
        "1.00",
    ]
    assert [text.get_text() for text in axes[7].texts][:2] == [".00", ".20"]


@pytest.mark.parametrize(("depths", "numbers"), [(2, True), (17, True), (18, False)])
def test_heat_maps_of_any_size_are_drawn(depths, numbers):
    matrices = {"model": {m: np.eye(depths) for m in MEASURES}}
    figure = figures.consistency_figure(matrices)
    assert bool(heat_maps(figure)[0].texts) == numbers
    assert figures.render(figure).startswith(b"\x89PNG")


def test_accuracies_are_percent_and_the_chosen_depth_is_marked():
    accuracy = {p: {"m": {0: 0.2, 1: 0.5, 2: 0.4}} for p in ("linear", "hidden")}
    figure = figures.accuracy_figure(accuracy, {"linear": 0.1, "hidden": 0.3}, {"linear": 1, "hidden": 2})
    for ax, chosen, floor in zip(figure.axes, ((1, 50), (2, 40)), (10, 30)):
        line, mark, dashed = ax.get_lines()
        np.testing.assert_allclose(line.get_xydata(), [(0, 20), (1, 50), (2, 40)])
        np.testing.assert_allclose(mark.get_xydata(), [chosen])
        np.testing.assert_allclose(dashed.get_ydata(), floor)
    assert "%" in figure.axes[0].get_ylabel()
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["m", "m: smallest within 1% of best", "log-mel, 11 frames"]


def test_the_thick_line_is_the_mean_of_the_last_steps():
    history = [(10.0 * i, float(i)) for i in range(1, 7)]
    figure = figures.loss_figure({"run": history}, "loss", window=3)
    _, smooth = figure.axes[0].get_lines()
    np.testing.assert_allclose(smooth.get_xydata(), [(30, 2), (40, 3), (50, 4), (60, 5)])


def test_the_vertical_axis_ends_where_it_is_told_to():
    panels = {"PER (%)": {"A": {1: (300.0, 9.0), 2: (40.0, 1.0)}}, "WER (%)": {"A": {1: (90.0, None), 2: (80.0, None)}}}
    cut, whole = figures.depth_figure(panels, tops={"PER (%)": 80.0}).axes
    assert cut.get_ylim()[1] == 80.0
    assert whole.get_ylim()[1] > 90.0


def test_formats():
    figure = figures.time_figure({"m": {1: 1.0, 2: 2.0}})
    assert figures.render(figure).startswith(b"\x89PNG")
    assert b"<svg" in figures.render(figure, "svg")
    with pytest.raises(ValueError, match="cannot draw a 'doc' file; expected one of"):
        figures.render(figure, "doc")


def test_no_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lcconformer\[demo\]"'):
        figures.time_figure({"m": {1: 1.0}})
