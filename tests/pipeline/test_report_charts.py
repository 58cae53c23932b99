"""Charts: where ticks stand, what is smoothed, and that every point is drawn where it belongs."""

import re

import numpy as np
import pytest

from rae.pipeline.report_charts import (
    linear_ticks,
    log_ticks,
    loss_chart,
    make_axis,
    rate_chart,
    running_mean,
    smoothing_window,
    thin,
    tick_label,
    uses_log,
)


@pytest.mark.parametrize(("low", "high"), [(0, 600), (0, 2500), (0, 1), (0.59, 1.53), (-3e-5, 4e-5), (0, 1_281_167)])
def test_linear_ticks_are_few_round_numbers_within(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 4 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9
    assert np.ptp(np.diff(ticks)) < 1e-6 * (high - low)


def test_linear_ticks_are_the_obvious_ones() -> None:
    assert linear_ticks(0, 2500) == (0, 500, 1000, 1500, 2000, 2500)
    assert linear_ticks(0, 600) == (0, 100, 200, 300, 400, 500, 600)


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.3), (1e-6, 3.0), (0.9, 4.1), (1e-12, 1e12)])
def test_log_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 4 <= len(ticks) <= 9
    assert low <= ticks[0] < ticks[-1] <= high


def test_a_log_axis_is_for_values_that_span_a_factor() -> None:
    assert uses_log(np.array([0.05, 0.3]))
    assert not uses_log(np.array([0.5, 1.5]))
    assert not uses_log(np.array([-1.0, 100.0]))


def test_an_axis_maps_its_ends_to_its_ends() -> None:
    for log in (False, True):
        axis = make_axis(0.1, 10.0, 200.0, 10.0, log=log)
        assert axis(np.array([0.1, 10.0])) == pytest.approx([200, 10])
    assert make_axis(0.1, 10.0, 200.0, 10.0, log=True)(1.0) == pytest.approx(105)
    assert float(make_axis(3.0, 3.0, 0.0, 100.0)(3.0)) == pytest.approx(50)


def test_the_running_mean_is_a_mean_of_neighbours() -> None:
    y = np.random.default_rng(0).normal(size=50)
    smooth = running_mean(y, 7)
    assert smooth[20] == pytest.approx(y[17:24].mean())
    assert smooth[1] == pytest.approx(y[:3].mean())
    assert smooth[-1] == pytest.approx(y[-1])
    assert smoothing_window(12) == 1
    assert smoothing_window(250) == 25


def test_a_long_log_is_thinned_by_means() -> None:
    x, y = np.arange(30_000.0), np.random.default_rng(0).normal(size=30_000)
    few_x, few_y = thin(x, y)
    assert len(few_x) == len(few_y) == 600
    assert few_y.mean() == pytest.approx(y.mean())
    assert len(loss_chart(x, y, "t", "y")) < 30_000


def test_charts_mark_few_points_and_smooth_many() -> None:
    few = loss_chart(np.arange(1.0, 13), np.linspace(1, 0.8, 12), "few", "loss")
    assert few.count("<circle") == 12
    assert 'class="raw"' not in few
    many = loss_chart(np.arange(1.0, 201), np.linspace(1, 0.8, 200), "many", "loss")
    assert 'class="raw"' in many
    assert "<circle" not in many


def test_points_lie_within_the_drawing_and_fall_with_the_loss() -> None:
    chart = loss_chart(np.arange(1.0, 11), np.geomspace(1, 0.01, 10), "falls", "loss")
    assert "log scale" in chart
    points = re.search(r'class="line" points="([^"]+)"', chart)
    assert points
    x, y = np.array([pair.split(",") for pair in points[1].split()], float).T
    assert (np.diff(x) > 0).all()
    assert np.diff(y) == pytest.approx(np.full(9, (y[-1] - y[0]) / 9), abs=0.11)  # a straight line on a log axis
    assert (x.min() > 0) & (x.max() < 480) & (y.min() > 0) & (y.max() < 250)


def test_one_point_and_constant_values_can_be_drawn() -> None:
    for chart in (loss_chart, lambda *args: rate_chart(*args[:3])):
        assert "NaN" not in chart(np.array([0.0]), np.array([0.0]), "one", "loss")
        assert "nan" not in chart(np.arange(5.0), np.full(5, 2e-4), "flat", "loss")


def test_texts_in_a_chart_are_escaped() -> None:
    chart = loss_chart(np.arange(3.0), np.ones(3), '"><script>', "<b>")
    assert "<script>" not in chart
    assert "<b>" not in chart


def test_tick_labels_are_short() -> None:
    labels = [tick_label(value) for value in (0.0, 0.05, 300, 2500, 20_000, 1_500_000, 2e-05)]
    assert labels == ["0", "0.05", "300", "2500", "20k", "1.5M", "2e-05"]
