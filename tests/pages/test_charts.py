"""Charts as SVG: where points, ticks and marks are."""

from xml.etree import ElementTree

import pytest

from mochi_tune.pages import charts
from mochi_tune.pages.charts import Line, Mark, line_chart, round_ticks, running_mean


def test_a_chart_puts_points_and_ticks_where_their_values_are():
    lines = [Line("a", "accent", [(0, 3.0), (50, 0.0), (200, 4.0)]), Line("b", "plain", [(100, 1.0)])]
    chart = ElementTree.fromstring(line_chart("a < b", lines, "steps", "dB"))
    first, second = (
        [tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in chart.iter("polyline")
    )
    left, right, top, bottom = charts.PLOT_LEFT, charts.PLOT_RIGHT, charts.PLOT_TOP, charts.PLOT_BOTTOM
    assert first == [(left, top + (bottom - top) / 4), (left + (right - left) / 4, bottom), (right, top)]
    assert second == [((left + right) / 2, top + (bottom - top) * 3 / 4)]
    assert len(list(chart.iter("circle"))) == 4
    texts = {text.text: text for text in chart.find("svg").iter("text") if "end" not in text.get("class", "")}
    assert list(texts) == ["0", "1", "2", "3", "4", "50", "100", "150", "200", "dB", "steps"]
    assert (float(texts["4"].get("y")), float(texts["200"].get("x"))) == (top + 4, right)
    assert chart.find("h3").text == "a < b"


def test_last_values_stand_apart():
    lines = [Line("a", "accent", [(0, 0), (1, 92)]), Line("b", "plain", [(0, 0), (1, 93)]), Line("c", "thin", [(1, 9)])]
    chart = ElementTree.fromstring(line_chart("x", lines, "", "", y_range=(0, 100)))
    ends = [(text.text, float(text.get("y"))) for text in chart.iter("text") if "end" in text.get("class", "")]
    assert [value for value, _ in ends] == ["93", "92"]
    assert ends[1][1] - ends[0][1] >= charts.MIN_GAP


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (0.172, 0.301, [0.15, 0.2, 0.25, 0.3, 0.35]),
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 400, [0, 100, 200, 300, 400]),
        (2, 2, [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert round_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 1]), (0, 12, [0, 5, 10, 15]), (7, 7, [2, 4, 6, 8, 10, 12]), (0, 3, [0, 1, 2, 3])],
)
def test_ticks_between_whole_numbers_are_whole(low, high, ticks):
    assert round_ticks(low, high, is_whole=True) == ticks


def test_the_mean_runs_behind():
    assert running_mean([(1, 2.0), (2, 4.0), (3, 9.0), (4, 2.0)], 3) == [(1, 2.0), (2, 3.0), (3, 5.0), (4, 5.0)]


def test_of_very_many_points_the_highest_and_lowest_of_each_pixel_are_drawn(monkeypatch):
    converted, line_of = [], charts._line
    monkeypatch.setattr(charts, "_line", lambda line, pixels: converted.extend(pixels) or line_of(line, pixels))
    points = [(x, 100.0 if x == 7777 else x % 2) for x in range(20_000)]
    chart = ElementTree.fromstring(line_chart("x", [Line("a", "thin", points)], "", ""))
    [line] = chart.iter("polyline")
    drawn = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(drawn) == len(converted) <= 2 * (charts.PLOT_RIGHT - charts.PLOT_LEFT + 1)
    assert min(y for _, y in drawn) == charts.PLOT_TOP and max(y for _, y in drawn) == charts.PLOT_BOTTOM
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)


def test_a_mark_is_at_its_point_and_what_lies_beyond_a_range_is_at_its_end():
    lines = [Line("a", "accent", [(0, 50.0), (5, 1.0), (10, 2.0)])]
    text = line_chart("x", lines, "", "", y_range=(0, 4), mark=Mark("best <5>", (5, 1.0)))
    chart = ElementTree.fromstring(text)
    [ring] = [each for each in chart.iter("circle") if each.get("class") == "mark"]
    middle = (charts.PLOT_LEFT + charts.PLOT_RIGHT) / 2
    assert float(ring.get("cx")) == middle
    assert float(ring.get("cy")) == charts.PLOT_BOTTOM - (charts.PLOT_BOTTOM - charts.PLOT_TOP) / 4
    assert "best <5>" in [each.text for each in chart.iter("text")]
    first = next(chart.iter("polyline")).get("points").split()[0]
    assert first == f"{charts.PLOT_LEFT:.1f},{charts.PLOT_TOP:.1f}"


def test_values_that_are_all_but_equal_are_drawn():
    assert "<svg" in line_chart("rate", [Line("a", "main", [(1, 1e-14), (2, 1.0000001e-14)])], "step", "")
