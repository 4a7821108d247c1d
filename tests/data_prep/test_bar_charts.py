import re

import pytest

from mochi_tune.data_prep.bar_charts import bar_chart, count_names, count_numbers


@pytest.mark.parametrize(
    ("values", "counted"),
    [
        ([], []),
        ([30, 24, 30, 23.98], [("23.98", 1), ("24", 1), ("30", 2)]),
        ([i / 10 for i in range(101)], [(f"{i} – {i + 2}", 20 if i < 8 else 21) for i in range(0, 10, 2)]),
        ([*range(10), 900], [("0 – 100", 10), *[(f"{i}00 – {i + 1}00", 0) for i in range(1, 8)], ("800 – 900", 1)]),
    ],
)
def test_many_numbers_are_counted_in_round_ranges(values, counted):
    assert count_numbers(values) == counted


@pytest.mark.parametrize("low", [0.0, 0.37, 29.9, 999.5])
@pytest.mark.parametrize("size", [1e-3, 0.7, 13.0, 1e5])
def test_every_number_is_counted_once_and_the_bars_are_few(low, size):
    values = [low + size * i / 49 for i in range(50)]
    counted = count_numbers(values)
    assert sum(count for _, count in counted) == 50 and 4 <= len(counted) <= 9


def test_rare_names_are_counted_together():
    names = [f"{i:02}" for i in range(12)] + ["07"] * 3
    counted = count_names(names)
    assert counted[0] == ("07", 4) and counted[-1] == ("4 others", 4) and len(counted) == 9
    assert count_names("aab") == [("a", 2), ("b", 1)]


def test_a_bar_is_as_long_as_its_count():
    chart = bar_chart("<title>", [("<a>", 4), ("b", 1), ("c", 0)])
    widths = [float(width) for width in re.findall(r'<rect class="bar"[^>]* width="([\d.]+)"', chart)]
    assert widths == [172, 43, 0]
    assert "<title>" not in chart and "<a>" not in chart and "&lt;a&gt;" in chart
    assert bar_chart("nothing", []) == ""
