"""Bar charts as SVG, and counts of values for them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

# In pixels: width of the chart, left and right ends of the bars, and height of a bar with its gap.
_CHART_WIDTH, _BAR_LEFT, _BAR_RIGHT, _BAR_HEIGHT = 354, 138, 310, 22
_MAX_BARS = 9


def count_numbers(values: Iterable[float]) -> list[tuple[str, int]]:
    """Counts numbers: each distinct value if there are few, else in up to nine ranges of equal, round width.

    Returns:
        Labels and counts by ascending value. Ranges include their lower end; the last one also its upper end.
    """
    counts = Counter(values)
    if len(counts) <= _MAX_BARS:
        return [(f"{value:g}", counts[value]) for value in sorted(counts)]
    low, high = min(counts), max(counts)
    power = 10 ** math.floor(math.log10((high - low) / _MAX_BARS))
    sizes = (power * m for m in (1, 2, 2.5, 5, 10, 20))
    step = next(s for s in sizes if math.ceil(high / s) - math.floor(low / s) <= _MAX_BARS)
    first, last = math.floor(low / step), math.ceil(high / step)
    ranges = [0] * (last - first)
    for value, count in counts.items():
        ranges[min(math.floor(value / step), last - 1) - first] += count
    return [(f"{(first + i) * step:g} – {(first + i + 1) * step:g}", count) for i, count in enumerate(ranges)]


def count_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Counts names, the most frequent first; if there are many, the least frequent are counted together."""
    counts = Counter(names).most_common()
    if len(counts) <= _MAX_BARS:
        return counts
    others = counts[_MAX_BARS - 1 :]
    return [*counts[: _MAX_BARS - 1], (f"{len(others)} others", sum(count for _, count in others))]


def bar_chart(title: str, bars: Sequence[tuple[str, int]]) -> str:
    """Returns an HTML figure with a horizontal bar for each label; "" without bars.

    Args:
        title: of the chart.
        bars: labels of at most about 20 characters, and counts.
    """
    if not bars:
        return ""
    most = max(count for _, count in bars)
    drawn = ""
    for number, (label, count) in enumerate(bars):
        top, width = number * _BAR_HEIGHT, (_BAR_RIGHT - _BAR_LEFT) * count / most
        drawn += (
            f'<text x="{_BAR_LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="bar" x="{_BAR_LEFT}" y="{top + 3}" width="{width:.1f}" height="{_BAR_HEIGHT - 6}" rx="2"/>'
            f'<text x="{_BAR_LEFT + width + 6:.1f}" y="{top + 15}">{count}</text>'
        )
    return (
        f'<figure><h3>{escape(title)}</h3><svg viewBox="0 0 {_CHART_WIDTH} {len(bars) * _BAR_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{drawn}</svg></figure>'
    )
