"""Draws the validation losses of a run as a PNG picture for the model card."""

import io
from collections.abc import Sequence

from mochi_tune.pages.charts import round_ticks

# The picture is drawn at this multiple of its size and reduced, which smooths the lines.
_SCALE = 2
_WIDTH, _HEIGHT = 720, 360
_LEFT, _TOP, _RIGHT, _BOTTOM = 76, 40, 24, 56
_INK, _PALE, _LINE, _PAPER = "#333333", "#dddddd", "#1f6fb4", "#ffffff"


def draw_losses(losses: Sequence[tuple[int, float]], title: str) -> bytes:
    """Returns a PNG picture of validation losses over the steps.

    Args:
        losses: (step, loss), sorted by step; at least one, and all losses finite.
        title: the title above the chart.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_SCALE * _WIDTH, _SCALE * _HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13 * _SCALE)
    steps = round_ticks(losses[0][0], losses[-1][0], is_whole=True)
    heights = round_ticks(min(loss for _, loss in losses), max(loss for _, loss in losses))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = (step - steps[0]) / (steps[-1] - steps[0]) * (_WIDTH - _LEFT - _RIGHT) + _LEFT
        y = _HEIGHT - _BOTTOM - (loss - heights[0]) / (heights[-1] - heights[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _SCALE * x, _SCALE * y

    for value in heights:
        left, right = place(steps[0], value), place(steps[-1], value)
        draw.line([left, right], _PALE, _SCALE)
        draw.text((left[0] - 8 * _SCALE, left[1]), f"{value:.6g}", _INK, font, "rm")
    for value in steps:
        x, y = place(value, heights[0])
        draw.line([(x, y), (x, y + 5 * _SCALE)], _INK, _SCALE)
        draw.text((x, y + 9 * _SCALE), f"{value:.0f}", _INK, font, "mt")
    draw.line([place(steps[0], heights[0]), place(steps[-1], heights[0])], _INK, _SCALE)
    points = [place(*loss) for loss in losses]
    draw.line(points, _LINE, 2 * _SCALE, "curve")
    for x, y in points:
        radius = 3 * _SCALE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _LINE)
    draw.text((_LEFT * _SCALE, 12 * _SCALE), title, _INK, font, "lt")
    draw.text(((_WIDTH - _RIGHT) * _SCALE, (_HEIGHT - 12) * _SCALE), "step", _INK, font, "rb")
    small = image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return file.getvalue()
