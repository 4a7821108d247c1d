"""Histograms as SVG, with a line at the limit beyond which values are flagged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Size and margins of the picture in pixels, and the number of bars.
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 354, 150, 6, 22, 24
_NUM_BINS = 32


@dataclass(frozen=True)
class Axis:
    """The axis of a histogram.

    Attributes:
        title: of the figure.
        note: description of the values.
        limit: beyond which values are flagged; None flags none.
        is_upper: whether values above the limit are flagged, or values below it.
        is_log: whether the axis is logarithmic; values below `floor` are drawn at `floor`.
        floor: minimum of a logarithmic axis.
        ceiling: the axis ends at this value or a larger one.
    """

    title: str
    note: str
    limit: float | None
    is_upper: bool = True
    is_log: bool = False
    floor: float = 0.01
    ceiling: float = 1.0


def histogram(axis: Axis, values: Sequence[float]) -> str:
    """Returns an HTML figure: bars of class "bar", flagged ones of class "bar out", and a line at the limit."""
    if not values:
        return ""

    def place(value: float) -> float:
        return math.log10(max(value, axis.floor)) if axis.is_log else value

    low = place(axis.floor) if axis.is_log else 0.0
    high = max(place(value) for value in (*values, axis.ceiling, axis.limit or 0.0))
    width = (high - low) / _NUM_BINS
    kept, out = [0] * _NUM_BINS, [0] * _NUM_BINS
    for value in values:
        is_out = axis.limit is not None and (value > axis.limit if axis.is_upper else value < axis.limit)
        number = min(int((place(value) - low) / width), _NUM_BINS - 1)
        (out if is_out else kept)[number] += 1
    most, floor = max(map(sum, zip(kept, out, strict=True))), _HEIGHT - _BOTTOM
    step = (_WIDTH - 2 * _LEFT) / _NUM_BINS
    drawn = ""
    for number, (inside, outside) in enumerate(zip(kept, out, strict=True)):
        x, base = _LEFT + number * step, float(floor)
        for count, kind in ((inside, "bar"), (outside, "bar out")):
            # At least 2 pixels, so that a few among thousands are visible.
            height = max((floor - _TOP) * count / most, 2) if count else 0
            base -= height
            if count:
                drawn += (
                    f'<rect class="{kind}" x="{x + 0.75:.1f}" y="{base:.1f}" width="{step - 1.5:.1f}" '
                    f'height="{height:.1f}" rx="1"><title>{count} clips</title></rect>'
                )
    drawn += f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - _LEFT}" y2="{floor}"/>'
    for value, anchor, x in ((low, "start", _LEFT), (high, "end", _WIDTH - _LEFT)):
        shown = 10**value if axis.is_log else value
        sign = "≤ " if axis.is_log and anchor == "start" else ""
        drawn += f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{sign}{_short(shown)}</text>'
    if axis.limit is not None:
        x = _LEFT + (place(axis.limit) - low) / (high - low) * (_WIDTH - 2 * _LEFT)
        anchor, shift = ("start", 5) if x < _WIDTH / 2 else ("end", -5)
        drawn += (
            f'<line class="limit" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{floor + 4}"/>'
            f'<text class="limit" x="{x + shift:.1f}" y="14" text-anchor="{anchor}">'
            f"{'above' if axis.is_upper else 'below'} {axis.limit:g}: {sum(out)}</text>"
        )
    return (
        f'<figure><h3>{escape(axis.title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(axis.title)}">{drawn}</svg><figcaption>{escape(axis.note)}</figcaption></figure>'
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
