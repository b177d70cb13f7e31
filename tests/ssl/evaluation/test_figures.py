"""Figures show the numbers they are given, on scales that can be compared."""

import sys

import numpy as np
import pytest

from lcconformer.ssl.evaluation import figures
from lcconformer.ssl.evaluation.consistency import MEASURES


def test_heat_maps_of_all_models_share_a_scale_per_measure():
    rng = np.random.default_rng(0)
    models = {name: {m: rng.uniform(-0.3, 1, (4, 4)) for m in MEASURES} for name in ("a", "b")}
    figure = figures.consistency_figure(models)
    images = [ax.get_images()[0] for ax in figure.axes if ax.get_images()]
    drawn = [image for image in images if image.get_array().shape == (4, 4)]
    assert len(drawn) == 6
    for column, measure in enumerate(MEASURES):
        pair = drawn[column::3]
        low = min(m[measure].min() for m in models.values())
        for image, model in zip(pair, models.values()):
            np.testing.assert_array_equal(image.get_array(), model[measure])
            assert image.get_clim() == (pytest.approx(min(0.0, low)), 1.0)
    titled = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_xlabel() for ax in titled] == ["depth"] * 3
    assert titled[0].get_ylabel().startswith("a")


def test_accuracies_are_percent_and_the_chosen_depth_is_marked():
    accuracy = {p: {"m": {0: 0.2, 1: 0.5, 2: 0.4}} for p in ("linear", "hidden")}
    figure = figures.accuracy_figure(accuracy, {"linear": 0.1, "hidden": 0.3}, {"linear": 1, "hidden": 2})
    for ax, chosen, floor in zip(figure.axes, ((1, 50), (2, 40)), (10, 30)):
        line, mark, dashed = ax.get_lines()
        np.testing.assert_allclose(line.get_xydata(), [(0, 20), (1, 50), (2, 40)])
        np.testing.assert_allclose(mark.get_xydata(), [chosen])
        np.testing.assert_allclose(dashed.get_ydata(), floor)
        assert "%" in ax.get_ylabel()


def test_the_thick_line_is_the_mean_of_the_last_steps():
    history = [(10.0 * i, float(i)) for i in range(1, 7)]
    figure = figures.loss_figure({"run": history}, "loss", window=3)
    _, smooth = figure.axes[0].get_lines()
    np.testing.assert_allclose(smooth.get_xydata(), [(30, 2), (40, 3), (50, 4), (60, 5)])


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
